// Scores made by cuBLAS -> E.
#pragma once

#include <device/arrival.cuh>

#include "cuda/host/head.cuh"

namespace nf {
namespace {

constexpr int64_t kColumnsPerBlock = 4096;  // of a row of scores

// scores -> E, stored as O (in place where O is T); with `partial`, S and A are added to rows. The
// target's E is 0: its term is added apart, in double and with its margin. Blocks: rows x splits.
template <class T, class O>
NF_KERNEL(kThreads)
exponentiate_kernel(const T* scores,  // [N, stride], `width` of them valid
                    O* e,             // [N, e_stride], perhaps the same memory
                    int64_t width, int64_t stride, int64_t e_stride, int64_t first,
                    const int64_t* __restrict__ labels,  // [N]
                    RowNumbers scale,
                    const double* __restrict__ shifts,  // [N]
                    RowState rows,
                    double* partial,     // [2, splits, N] or null
                    unsigned* arrivals)  // [N], all 0
{
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  const int64_t i = block_id(), split = block_y(), splits = block_count_y();
  const int64_t begin = split * kColumnsPerBlock;
  const int64_t end = begin + kColumnsPerBlock < width ? begin + kColumnsPerBlock : width;
  const int64_t target = target_place(labels[i], first, width);
  const T s = T(scale.at(i)), shift = T(shifts[i]);
  T sum = 0, sum_cosine = 0;
  for (int64_t j = begin + thread_id(); j < end; j += kThreads) {
    const T cosine = scores[i * stride + j];
    const T value = j == target ? T(0) : std::exp(cosine * s - shift);
    e[i * e_stride + j] = O(value);
    sum += value;
    sum_cosine += value * cosine;
  }
  if (partial == nullptr) return;
  const double total = block_sum(double(sum), scratch), total_cosine = block_sum(double(sum_cosine), scratch);
  if (thread_id() == 0) {
    partial[split * rows.batch + i] = total;
    partial[(splits + split) * rows.batch + i] = total_cosine;
  }
  if (last_to_arrive(arrivals + i, unsigned(splits)) && thread_id() == 0)
    add_partials(rows, partial, splits, i);
}

inline int64_t exponentiate_splits(int64_t width) {
  return (width + kColumnsPerBlock - 1) / kColumnsPerBlock;
}

// With `partials` null, E alone.
template <class T>
void exponentiate(Queue& queue, const Head<T>& head, int64_t first, int64_t width, const Tensor& scores,
                  const Tensor& e, const double* shift, const RowState& rows, double* partials,
                  unsigned* arrivals) {
  const Grid grid{head.batch, exponentiate_splits(width)};
  const size_t shared = shared_bytes<double>(kThreads / kWarp);
  const int64_t stride = head.padded(width);
  T* from = static_cast<T*>(scores.mutable_data_ptr());
  const auto run = [&]<class O>(O* to) {
    launch("exponentiate", queue, exponentiate_kernel<T, O>, grid, kThreads, shared, from, to, width, stride,
           stride, first, head.label_data(), head.scale, shift, rows, partials, arrivals);
  };
  if (head.is_16_bit)
    run(static_cast<BFloat16*>(e.mutable_data_ptr()));
  else
    run(static_cast<T*>(e.mutable_data_ptr()));
}

}  // namespace
}  // namespace nf
