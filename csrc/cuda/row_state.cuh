// rows[field][i] of row_state.h, in device memory.
#pragma once

#include <device/launch.cuh>

#include "checks.h"
#include "row_state.h"

namespace nf {

struct RowState {
  double* data;
  int64_t batch;

  explicit RowState(const Tensor& rows)
      : data(static_cast<double*>(const_cast<void*>(rows.const_data_ptr()))), batch(rows.size(1)) {}
  NF_DEVICE double& at(RowField field, int64_t i) const { return data[field * batch + i]; }
};

// The place of a label's class among the `width` classes from `first` on, -1 where it is not there. What
// stands for no class (an ignored row) may be any int64, whose difference to `first` need not exist.
NF_DEVICE int64_t target_place(int64_t label, int64_t first, int64_t width) {
  return label >= first && label - first < width ? label - first : -1;
}

// Row i's S and A += partial sums [2, splits, batch] of theirs, in the order of the splits.
NF_DEVICE void add_partials(const RowState& rows, const double* partial, int64_t splits, int64_t i) {
  double sum = 0, sum_cosine = 0;
  for (int64_t k = 0; k < splits; ++k) {
    sum += partial[k * rows.batch + i];
    sum_cosine += partial[(splits + k) * rows.batch + i];
  }
  rows.at(kSum, i) += sum;
  rows.at(kSumCosine, i) += sum_cosine;
}

}  // namespace nf
