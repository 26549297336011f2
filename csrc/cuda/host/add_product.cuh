// x_sum over the chunks of a sweep, forward or backward.
#pragma once

#include "cuda/host/head.cuh"

namespace nf {
namespace {

// sum[i] += part[i]
template <class T>
NF_KERNEL(kThreads)
accumulate_kernel(const T* __restrict__ part, int64_t count, T* __restrict__ sum) {
  const int64_t i = block_id() * kThreads + thread_id();
  if (i < count) sum[i] += part[i];
}

// x_sum [N, D] += E w of a chunk, by way of `part` (torch's stable ABI has no product that adds), part_cells long; the
// first chunk writes it. e [N, stride], w [width, D], both of the type that the head calls `other`.
template <class T>
void add_product(Queue& queue, const Head<T>& head, const Chunk& of, const Array& e, const Array& w,
                 const Array& x_sum, const Array& part) {
  const int64_t N = head.batch, D = head.dim;
  if constexpr (std::is_same_v<T, float>)
    if (head.tf32())
      return tf32_sums(queue, {data_of<const float>(e), of.stride(), of.stride(), data_of<const float>(w), N,
                               D, of.width, data_of<float>(part), data_of<float>(x_sum), of.first > 0});
  multiply(head.in.x, {e.data(), head.other, N, of.width, of.stride()},
           {w.data(), head.other, of.width, D, D},
           {(of.first == 0 ? x_sum : part).data(), head.wide, N, D, D});
  if (of.first > 0)
    launch("accumulate", queue, accumulate_kernel<T>, thread_per(N * D), kThreads, 0, data_of<const T>(part),
           N * D, data_of<T>(x_sum));
}

}  // namespace
}  // namespace nf
