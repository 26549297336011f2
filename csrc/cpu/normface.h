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

inline math::RowSoftmax softmax_of(const RowState& rows, double scale, int64_t i) {
  return math::softmax_row(rows[kSum][i], rows[kShift][i], scale * rows[kPsi][i]);
}

inline math::SmoothingTerms smoothing_of(const RowState& rows, int64_t i) {
  return {rows[kTotal][i], rows[kSmooth][i], rows[kPull][i], rows[kPush][i]};
}

}  // namespace nf::cpu
