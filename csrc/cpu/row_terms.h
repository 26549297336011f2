// What the three stages of the fused head share on the CPU: the rows' state, labels, and a tile of scores
// turned into E. See csrc/math/softmax.h for the formulas.
//
// A tile of scores is one BLAS call, is turned into E in place while it is in cache, and feeds the
// product that adds up x_sum. Stored E lies tile by tile: that of the tile at class f starts at N * f,
// row-major [N, width].
#pragma once

#include "cpu/head.h"
#include "engine/head_arguments.h"
#include "engine/row_state.h"
#include "math/softmax.h"

namespace nf::cpu {

// table[field][i] of row_state.h, Field being RowField or SlopeField.
template <class Field>
struct RowTableOf {
  double* data;
  int64_t batch;

  explicit RowTableOf(const Tensor& t)
      : data(static_cast<double*>(const_cast<void*>(t.const_data_ptr()))), batch(t.size(1)) {}
  double* operator[](Field field) const { return data + field * batch; }
};
using RowState = RowTableOf<RowField>;
using RowSlopes = RowTableOf<SlopeField>;

// A number of every row: a float argument, or the tensor [] or [N] given in its place.
class RowNumbers {
 public:
  RowNumbers(const std::optional<Tensor>& t, double value) {
    if (!t || t->dim() == 0) {
      value_ = number_argument(t, value);
      return;
    }
    rows_.resize(size_t(t->size(0)));
    if (t->scalar_type() == ScalarType::Double) {
      std::copy_n(static_cast<const double*>(t->const_data_ptr()), rows_.size(), rows_.data());
    } else {
      std::vector<float> wide(rows_.size());
      stored_rows<float>(t->scalar_type())
          .widen(t->const_data_ptr(), int64_t(rows_.size()), 1.0f, wide.data());
      std::copy(wide.begin(), wide.end(), rows_.begin());
    }
  }
  double operator[](int64_t i) const { return rows_.empty() ? value_ : rows_[size_t(i)]; }

 private:
  double value_ = 0;
  std::vector<double> rows_;
};

// scores -> E in place; sums, when given, receive S and A of this tile. The target's E is 0: its term
// is added apart, in the accumulator's precision and with its margin.
template <class T>
void exponentiate(const HeadShape& shape, const Labels& labels, const double* shift, const RowNumbers& scale,
                  const Tile& tile, T* scores, double* sum, double* sum_cosine) {
  for (int64_t i = 0; i < shape.batch; ++i) {
    T* row = scores + i * tile.width;
    around_target(labels.data[i], tile, [&](int64_t begin, int64_t end) {
      const auto part = accum_rows<T>().exp_fold(row + begin, end - begin, T(scale[i]), T(shift[i]));
      if (sum == nullptr) return;
      sum[i] += part.exp;
      sum_cosine[i] += part.exp_cosine;
    });
    const int64_t target = target_place(labels.data[i], tile.first, tile.width);
    if (target >= 0) row[target] = T(0);
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

}  // namespace nf::cpu
