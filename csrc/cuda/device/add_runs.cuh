// Sums over many things that were made run by run.
#pragma once

#include "cuda/device/per_row.cuh"
#include "cuda/device/reduce.cuh"

namespace nf {
namespace {

// sum[d] = the sum over the runs of partial[., d], in an order that their number alone decides. One warp per column.
template <class T>
NF_KERNEL(kThreads)
add_runs_kernel(const double* __restrict__ partial,  // [runs, count]
                int64_t runs, int64_t count,
                T* __restrict__ sum)  // [count]
{
  const int64_t d = block_id() * kRowsPerBlock + warp_id();
  if (d >= count) return;  // the whole warp leaves
  double total = 0;
#pragma unroll 4
  for (int64_t k = lane_id(); k < runs; k += kWarp) total += partial[k * count + d];
  total = warp_sum(total);
  if (lane_id() == 0) sum[d] = T(total);
}

template <class T>
void add_runs(Queue& queue, const double* partial, int64_t runs, int64_t count, T* sum) {
  launch("add_runs", queue, add_runs_kernel<T>, warp_per_row(count), kThreads, 0, partial, runs, count, sum);
}

}  // namespace
}  // namespace nf
