// What the three stages of the fused head share on the CPU: the rows' state, labels, and a tile of scores
// turned into E. See csrc/math/softmax.h for the formulas.
//
// A tile of scores is one BLAS call, is turned into E in place while it is in cache, and feeds the
// product that adds up x_sum. Stored E lies tile by tile: that of the tile at class f starts at N * f,
// row-major [N, width].
#pragma once

#include "cpu/head.h"
#include "math/softmax.h"
#include "row_state.h"

namespace nf::cpu {

// rows[field][i]
struct RowState {
  double* data;
  int64_t batch;
  double* operator[](RowField field) const { return data + field * batch; }
};

inline RowState row_state(const Tensor& rows) {
  return {static_cast<double*>(const_cast<void*>(rows.const_data_ptr())), rows.size(1)};
}

// [N]: the place of every row's target among the classes at hand, kElsewhere, or the ignored index.
struct Labels {
  const int64_t* data;
  int64_t batch;

  explicit Labels(const Tensor& t)
      : data(static_cast<const int64_t*>(t.const_data_ptr())), batch(t.size(0)) {}

  void check(const char* op, int64_t classes, int64_t ignore_index, bool partial) const {
    for (int64_t i = 0; i < batch; ++i)
      if (data[i] != ignore_index && !(partial && data[i] == kElsewhere) &&
          (data[i] < 0 || data[i] >= classes))
        fail(op, ": expected `labels` in [0, ", classes, ") or ignore_index (", ignore_index, "), got ",
             data[i], " at row ", i);
  }
};

// Scores of one tile, [N, width] = x_hat w_hat^T.
template <class T>
void score_tile(const HeadShape& shape, T* x_hat, T* w_hat, const Tile& tile, T* scores) {
  multiply<T>({x_hat, shape.batch, shape.dim, shape.dim},
              Matrix<T>{w_hat, tile.width, shape.dim, shape.dim}.transposed(),
              {scores, shape.batch, tile.width, tile.width});
}

// Calls part(begin, end) for the columns of a tile other than the row's own target.
template <class Part>
void around_target(int64_t label, const Tile& tile, const Part& part) {
  const int64_t target = label - tile.first;
  if (target < 0 || target >= tile.width) return part(0, tile.width);
  part(0, target);
  part(target + 1, tile.width);
}

// scores -> E in place; sums, when given, receive S and A of this tile. The target's E is 0: its term
// is added apart, in the accumulator's precision and with its margin.
template <class T>
void exponentiate(const HeadShape& shape, const Labels& labels, const double* shift, double scale,
                  const Tile& tile, T* scores, double* sum, double* sum_cosine) {
  for (int64_t i = 0; i < shape.batch; ++i) {
    T* row = scores + i * tile.width;
    around_target(labels.data[i], tile, [&](int64_t begin, int64_t end) {
      const auto part = accum_rows<T>().exp_fold(row + begin, end - begin, T(scale), T(shift[i]));
      if (sum == nullptr) return;
      sum[i] += part.exp;
      sum_cosine[i] += part.exp_cosine;
    });
    const int64_t target = labels.data[i] - tile.first;
    if (target >= 0 && target < tile.width) row[target] = T(0);
  }
}

// Constant factors of the classes, all 1 unless given.
template <class T>
struct ClassWeights {
  bool given;
  const T* data;  // [C]; null in an empty shard too

  explicit ClassWeights(const std::optional<Tensor>& t)
      : given(t.has_value()), data(given ? static_cast<const T*>(t->const_data_ptr()) : nullptr) {}
  double operator[](int64_t j) const { return given ? double(data[j]) : 1.0; }
};

inline math::RowSoftmax softmax_of(const RowState& rows, double scale, int64_t i) {
  return math::softmax_row(rows[kSum][i], rows[kShift][i], scale * rows[kPsi][i]);
}

inline math::RowWeights weights_of(const RowState& rows, int64_t i) {
  return {rows[kTotal][i], rows[kSmooth][i], rows[kPull][i], rows[kPush][i]};
}

template <class T>
T* data_or_null(const Tensor& t) {
  return t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

}  // namespace nf::cpu
