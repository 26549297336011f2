// The head without E in memory, for rows of at most kSweepColumns: a tile of scores turns into E in registers
// and meets its second factor at once. Forward makes S, A and x_sum in one pass over the classes; backward
// computes the scores again and writes dW. Definition: sm80_single_sweep.cu.
#pragma once

#include "cuda/device/class_gradient.cuh"
#include "cuda/device/row_state.cuh"
#include "cuda/device/term_rows.cuh"

namespace nf {

constexpr int64_t kSweepColumns = 256;

struct SingleSweep {
  const Half* x_hat;       // [batch, dim], dim a multiple of 8
  const Half* w_hat;       // [width, dim]
  const BFloat16* w_copy;  // [width, dim], the same rows
  int64_t batch;
  int64_t dim;
  int64_t width;
  int64_t first;     // class of w_hat's row 0
  TermRows rows;     // of the softmax's term
  SweepSums sums;    // arrivals: [sweep_row_blocks(batch)]
  float* x_partial;  // [splits, batch, dim]
  float* x_sum;      // [batch, dim]
  bool add;          // to x_sum, rather than overwrite it
};

// What a class needs to know of a row of the batch: math::PowerOfTwo, and its label.
struct alignas(16) SweepRow {
  float slope;
  float offset;
  int label;
};

struct SweepGradient {
  const Half* w_hat;         // [width, dim]
  const Half* x_hat;         // [batch, dim]
  const BFloat16* weighted;  // [batch, dim]
  const SweepRow* rows;      // [batch]
  ClassGradient classes;
};

int64_t sweep_row_blocks(int64_t batch);
// Blocks along the classes, each with its own partial sums.
int64_t sweep_splits(const Queue& queue, int64_t batch, int64_t dim, int64_t width);

// S and A are added up, x_sum is written or added to.
void single_sweep(Queue& queue, const SingleSweep& task);

void sweep_gradient(Queue& queue, const SweepGradient& task);

}  // namespace nf
