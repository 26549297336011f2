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

}  // namespace nf
