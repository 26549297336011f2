// Scores by our own tensor-core kernel: E = exp(s x_hat w_hat^T - kappa) leaves the kernel as bfloat16
// and the scores themselves never reach memory. Definition: sm80_scores.cu.
#pragma once

#include <device/launch.cuh>

#include "cuda/device/row_state.cuh"
#include "cuda/device/stored.cuh"

namespace nf {

struct ScoreExp {
  const Half* x_hat;  // [batch, dim]
  const Half* w_hat;  // [width, dim]
  int64_t batch;
  int64_t dim;  // a multiple of 8, so that rows begin at multiples of 16 bytes
  int64_t width;
  int64_t first;               // class of w_hat's row 0
  double largest_fixed_scale;  // math::FixedShift of all classes
  const int64_t* labels;
  RowNumbers scale;
  const double* shift;  // [batch]
  RowState rows;        // with partial
  BFloat16* e;          // [batch, stride] or null: only the sums
  int64_t stride;       // a multiple of 8
  double* partial;      // [2, splits, batch] or null
  unsigned* arrivals;   // [one per 128 rows], all 0; with partial
  float* largest;       // [splits, batch]
};

// Blocks along the classes, each with its own partial sums.
int64_t score_splits(const Queue& queue, int64_t batch, int64_t dim, int64_t width);

// `largest[split][i]` = the row's largest s c_j of the split, j != y_i. Where the fixed shift of math/softmax.h
// serves the one scale of all rows, it returns at once and writes nothing.
void score_largest(Queue& queue, const ScoreExp& task);

// E; with `partial`, S and A added to rows.
void score_exp(Queue& queue, const ScoreExp& task);

}  // namespace nf
