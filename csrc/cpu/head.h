// What the two heads (norm_linear, normface_loss) share on the CPU: classes walked in tiles, a thread
// per run of tiles, unit rows made tile by tile in the accumulator type T.
#pragma once

#include <optional>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/interrupt.h"
#include "cpu/library.h"

namespace nf::cpu {

// Rows of W, whole classes of `centers` rows each. In memory they lie centre by centre, so that the cosines of a
// class's centres are compared vector by vector.
struct Tile {
  int64_t first;
  int64_t width;
  int64_t centers = 1;

  int64_t classes() const { return width / centers; }
  // Where row first + r lies.
  int64_t column(int64_t r) const { return centers == 1 ? r : r % centers * classes() + r / centers; }
  // The class of the tile that a row of W belongs to, -1 where it is not here.
  int64_t class_of(int64_t label) const {
    const int64_t place = target_place(label, first, width);
    return place < 0 ? place : place / centers;
  }
};

struct HeadShape {
  int64_t batch;    // N
  int64_t dim;      // D
  int64_t classes;  // C
  int64_t chunk;    // classes per tile
  int64_t tiles;
  int64_t slots;    // threads that take part; each owns a contiguous run of tiles
  int64_t centers;  // of a class, of which "classes" are the rows of W

  HeadShape(const Tensor& x, const Tensor& weight, int64_t class_chunk, int64_t centers_of_class = 1)
      : batch(x.size(0)),
        dim(x.size(1)),
        classes(weight.size(0)),
        chunk(std::max<int64_t>(1, std::min(class_chunk, classes))),
        tiles((classes + chunk - 1) / chunk),
        slots(std::max<int64_t>(1, std::min(thread_count(), tiles))),
        centers(centers_of_class) {}

  // body(slot, tile) for every tile, in order within a slot. Ctrl-C ends it between tiles.
  template <class Body>
  void for_tiles(const Body& body) const {
    Interruption interruption;
    for_slots(slots, tiles, [&](int64_t slot, int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end && !interruption.stopped(); ++k)
        body(slot, Tile{k * chunk, std::min(chunk, classes - k * chunk), centers});
    });
    interruption.rethrow();
  }
};

// [N]: the place of every row's target among the classes at hand, kElsewhere, or the ignored index.
struct Labels {
  const int64_t* data;
  int64_t batch;

  explicit Labels(const Tensor& t)
      : data(static_cast<const int64_t*>(t.const_data_ptr())), batch(t.size(0)) {}

  void check(const char* op, int64_t classes, int64_t ignore_index, bool is_shard) const {
    for (int64_t i = 0; i < batch; ++i)
      if (data[i] != ignore_index && !(is_shard && data[i] == kElsewhere) &&
          (data[i] < 0 || data[i] >= classes))
        fail(op, ": expected `labels` in [0, ", classes, ") or ignore_index (", ignore_index, "), got ",
             data[i], " at row ", i);
  }
};

// Scores of one tile, [N, width] = x_hat w_hat^T. Centre by centre, so that equal centres of a class have equal
// cosines: what a library does with a column may depend on its place in the product.
template <class T>
void score_tile(const HeadShape& shape, T* x_hat, T* w_hat, const Tile& tile, const Matrix<T>& scores) {
  const int64_t classes = tile.classes();
  for (int64_t k = 0; k < tile.centers; ++k)
    multiply<T>({x_hat, shape.batch, shape.dim, shape.dim},
                Matrix<T>{w_hat + k * classes * shape.dim, classes, shape.dim, shape.dim}.transposed(),
                {scores.data + k * classes, shape.batch, classes, scores.row_stride});
}

// Calls part(begin, end) for the classes of a tile other than the row's own target.
template <class Part>
void around_target(int64_t label, const Tile& tile, const Part& part) {
  const int64_t target = tile.class_of(label);
  if (target < 0) return part(0, tile.classes());
  part(0, target);
  part(target + 1, tile.classes());
}

// The value of a float argument or of the 0-d tensor given in its place.
inline double number_argument(const std::optional<Tensor>& scale, double value) {
  if (!scale) return value;
  switch (scale->scalar_type()) {
    case ScalarType::Double:
      return *static_cast<const double*>(scale->const_data_ptr());
    default: {
      float wide;
      stored_rows<float>(scale->scalar_type()).widen(scale->const_data_ptr(), 1, 1.0f, &wide);
      return wide;
    }
  }
}

// The unit rows of a tile, where they lie; inverse[r] = 1 / ||.|| of its r-th, held at the largest number.
template <class T>
void unit_rows(const Rows<T>& x, const Tile& tile, T eps, T* y, T* inverse) {
  for (int64_t r = 0; r < tile.width; ++r)
    inverse[r] =
        x.kernel.normalize_wide(x.row(tile.first + r), x.length, 2, eps, y + tile.column(r) * x.length)
            .inverse();
}

// How row r was scaled, from the 1 / ||.|| saved before; where that does not say it all, y is its unit row.
template <class T>
math::RowScale<T> scale_again(const Rows<T>& x, int64_t r, T inverse, T eps, T* y) {
  if (math::inverse_serves(inverse)) return {inverse, T(1), T(1) / inverse};
  return x.kernel.normalize_wide(x.row(r), x.length, 2, eps, y);
}

// Unit row r once more.
template <class T>
math::RowScale<T> unit_row_again(const Rows<T>& x, int64_t r, T inverse, T eps, T* y) {
  const math::RowScale<T> scale = scale_again(x, r, inverse, eps, y);
  if (math::inverse_serves(inverse)) x.kernel.widen(x.row(r), x.length, inverse, y);
  return scale;
}

// sum over slots of parts[slot * count + k], in slot order, into parts[k].
template <class T>
void add_slots(T* parts, int64_t slots, int64_t count) {
  for_rows(count, slots, [&](int64_t k) {
    for (int64_t slot = 1; slot < slots; ++slot) parts[k] += parts[slot * count + k];
  });
}

// A sum of `count` numbers that every slot adds to: the first straight into it, the others into partners of it,
// which join it in slot order. Nothing where there is no sum to make (null).
template <class T>
class SlotSum {
 public:
  // Room for the partners.
  static Array room(Block& scratch, bool wanted, int64_t slots, int64_t count) {
    return scratch.array<T>(wanted ? (slots - 1) * count : 0);
  }

  SlotSum(T* sum, const Array& rest, int64_t slots, int64_t count)
      : sum_(sum), rest_(data_of<T>(rest)), partners_(slots - 1), count_(count) {
    if (sum == nullptr) return;
    std::fill_n(sum, count, T(0));
    std::fill_n(rest_, partners_ * count, T(0));
  }

  explicit operator bool() const { return sum_ != nullptr; }
  T* of(int64_t slot) const { return slot == 0 ? sum_ : rest_ + (slot - 1) * count_; }
  void join() const {
    if (sum_ == nullptr || partners_ == 0) return;
    for_rows(count_, partners_, [&](int64_t k) {
      for (int64_t partner = 0; partner < partners_; ++partner) sum_[k] += rest_[partner * count_ + k];
    });
  }

 private:
  T *sum_, *rest_;
  int64_t partners_, count_;
};

template <class T>
double dot_in_double(const T* a, const T* b, int64_t n) {
  double sum[4] = {};
  for (int64_t j = 0; j < n; ++j) sum[j & 3] += double(a[j]) * double(b[j]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace nf::cpu
