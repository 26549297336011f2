// x_sum of the single sweep, from what the splits have of it.
#pragma once

#include <device/vector.cuh>

#include "cuda/products/sm80_single_sweep.h"

namespace nf {
namespace {

// Of the rows [first, end), the splits in their order, kUnroll of them under way at once. By kThreads threads, all of the
// block.
template <int kThreads, int kUnroll>
NF_DEVICE void add_x_parts(const SingleSweep& task, int64_t splits, int64_t first, int64_t end) {
  for (int64_t at4 = first * task.dim + 4 * thread_id(); at4 < end * task.dim; at4 += 4 * kThreads) {
    Vector<float, 4> total = {};
    if (task.add) total = load_vector<4>(task.x_sum + at4);
#pragma unroll kUnroll
    for (int64_t k = 0; k < splits; ++k) {
      const auto part = load_vector<4>(task.x_partial + k * task.batch * task.dim + at4);
      for (int e = 0; e < 4; ++e) total.at[e] += part.at[e];
    }
    store_vector_global<4>(task.x_sum + at4, total);
  }
}

}  // namespace
}  // namespace nf
