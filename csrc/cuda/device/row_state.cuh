// The tables [field][i] of row_state.h, in device memory.
#pragma once

#include <device/launch.cuh>

#include "checks.h"
#include "engine/row_state.h"

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
