// The tables [field][i] of row_state.h, in device memory.
#pragma once

#include <device/launch.cuh>

#include "checks.h"
#include "engine/row_state.h"
#include "math/larger.h"

namespace nf {

template <class Field>
struct TableOfRows {
  double* data;
  int64_t batch;

  explicit TableOfRows(const Tensor& rows)
      : data(static_cast<double*>(const_cast<void*>(rows.const_data_ptr()))), batch(rows.size(1)) {}
  NF_DEVICE double& at(Field field, int64_t i) const { return data[field * batch + i]; }
  const double* of(Field field) const { return data + field * batch; }
};
using RowState = TableOfRows<RowField>;
using RowSlopes = TableOfRows<SlopeField>;

// Where a sweep leaves the sums of its rows, and their largest cosines where those are wanted: every block of a
// row its own, and the last one adds them up.
struct SweepSums {
  RowState rows;
  double* partial;       // [2, splits, batch], or null: the sums are not wanted
  unsigned* arrivals;    // [one per row, or per block of rows], all 0
  bool largest = false;  // partial is [3, splits, batch]

  NF_DEVICE double& value(int64_t split, int64_t i) const { return partial[split * rows.batch + i]; }
  NF_DEVICE double& second(int64_t split, int64_t splits, int64_t i) const {
    return partial[(splits + split) * rows.batch + i];
  }
  NF_DEVICE double& largest_cosine(int64_t split, int64_t splits, int64_t i) const {
    return partial[(2 * splits + split) * rows.batch + i];
  }
  // Row i's sums += the partial ones, in the order of the splits.
  template <bool kWithLargest>
  NF_DEVICE void add(int64_t splits, int64_t i) const {
    double of_value = 0, of_second = 0;
    for (int64_t k = 0; k < splits; ++k) {
      of_value += value(k, i);
      of_second += second(k, splits, i);
    }
    rows.at(kSum, i) += of_value;
    rows.at(kSecondSum, i) += of_second;
    if constexpr (kWithLargest) {
      double best = rows.at(kLargestCosine, i);
      for (int64_t k = 0; k < splits; ++k) best = math::larger(best, largest_cosine(k, splits, i));
      rows.at(kLargestCosine, i) = best;
    }
  }
};

}  // namespace nf
