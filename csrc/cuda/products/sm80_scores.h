// Scores by our own tensor-core kernel: what the term makes of x_hat w_hat^T leaves the kernel as bfloat16 and
// the scores themselves never reach memory. Definition: sm80_scores.cu.
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

// Blocks along the classes, each with its own partial sums.
int64_t score_splits(const Queue& queue, int64_t batch, int64_t dim, int64_t width);

// `largest[split][i]` = the row's largest s f(c_j) of the split, j != y_i, for terms that have a shift. Where the
// fixed one serves the one scale of all rows, it returns at once and writes nothing.
void score_largest(Queue& queue, const ScoreTask& task);

// Coefficients and their sums.
void score_fold(Queue& queue, const ScoreTask& task);

}  // namespace nf
