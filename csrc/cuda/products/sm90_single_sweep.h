// The single sweep of sm80_single_sweep.h by wgmma, on compute capability 9.0: the same tasks, from the same operands.
// Definition: sm90_single_sweep.cu.
#pragma once

#include "cuda/products/sm80_single_sweep.h"

namespace nf {

// Blocks along the classes, each with its own partial sums.
int64_t sm90_sweep_splits(const Queue& queue, int64_t batch, int64_t dim, int64_t width);

// S and A are added up, x_sum is written or added to; no arrivals are counted.
void sm90_single_sweep(Queue& queue, const SingleSweep& task);

void sm90_sweep_gradient(Queue& queue, const SweepGradient& task);

}  // namespace nf
