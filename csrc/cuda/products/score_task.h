// What the kernels of scores are told (sm80_scores.cu, sm90_scores.cu): what the term makes of x_hat w_hat^T leaves
// them as bfloat16, and the scores themselves never reach memory.
#pragma once

#include <device/launch.cuh>

#include "cuda/device/row_state.cuh"
#include "cuda/device/term_rows.cuh"
#include "math/softmax.h"

namespace nf {

struct ScoreTask {
  const Half* x_hat;  // [batch, dim]
  const Half* w_hat;  // [width, dim]
  int64_t batch;
  int64_t dim;  // a multiple of 8, so that rows begin at multiples of 16 bytes
  int64_t width;
  int64_t first;  // class of w_hat's row 0
  math::FixedShift window;
  TermRows rows;
  SweepSums sums;  // arrivals: one per 128 rows
  BFloat16* e;     // [batch, stride] or null: only the sums
  int64_t stride;  // a multiple of 8
  float* largest;  // [splits, batch], for score_largest
};

}  // namespace nf
