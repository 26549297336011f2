// dW of classes whose product a library has left in memory.
#pragma once

#include <algorithm>

#include "cuda/device/class_gradient.cuh"
#include "cuda/device/per_row.cuh"
#include "cuda/device/rows.cuh"

namespace nf {
namespace {

// Classes of a block, in whole rounds of its warps: a block looks through the labels of the batch, which should be
// little beside the rows of its classes, and every multiprocessor should have many blocks.
inline int64_t classes_of_block(const Queue& queue, int64_t batch, int64_t width, int64_t of_round) {
  constexpr int64_t kLabelsOfClass = 32, kBlocks = 16, kLeast = 32, kMost = 256;
  const int64_t spread = std::max(kLeast, width / (kBlocks * queue.multiprocessors()));
  const int64_t wanted = std::clamp(batch / kLabelsOfClass, kLeast, std::min(spread, kMost));
  return (wanted + of_round - 1) / of_round * of_round;
}

// From g, [width, D], which may be dW itself; where the rows lie in the registers of their warp, g and W are read
// once. While the first ones are on their way, the block counts the targets of its classes.
template <class S, class Shape>
NF_KERNEL_RESIDENT(kThreads, (kResidentOf<Shape, kThreads, 2>))
class_gradients_kernel(ClassGradient task, accum_t<S>* g, int64_t of_block) {
  using T = accum_t<S>;
  constexpr int kVec = Shape::kVec, kRows = Shape::kRows;
  SharedMemory shared;
  int* counts = shared.take<int>(of_block);
  const int64_t dim = task.dim, tile = block_id() * of_block;
  const int64_t end = tile + of_block < task.width ? tile + of_block : task.width;
  const S* weight = static_cast<const S*>(task.weight.data) + task.first * dim;
  S* dw = static_cast<S*>(task.dw.data) + (task.first - task.dw_first) * dim;
  const T* inverses = static_cast<const T*>(task.inverse) + task.first;
  bool counted = false;
  for (int64_t at = tile + warp_id() * kRows;; at += kRowsPerBlock * kRows) {
    const WarpPlace<Shape> place(at, end);
    const int64_t length = place.has(0) ? dim : 0;
    T inverse[kRows], radial[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) inverse[r] = place.has(r) ? inverses[at + r] : T(1);
    const WarpRows<S, Shape> own(weight + at * dim, length, place);
    WarpRows<T, Shape> product(g + at * dim, length, place);
    if (!counted) count_targets<kThreads, 4>(task, tile, of_block, counts);
    counted = true;
    if (!place.has(0)) return;

    bool found = false;
#pragma unroll 1  // seldom: its registers matter, not its speed
    for (int r = 0; r < kRows; ++r) {
      const int targets = place.has(r) ? counts[at - tile + r] : 0;
      if (targets == 0) continue;
      if (!found) sync_warp();  // the lanes' reads of g, before others write there
      add_targets(task, task.first + at + r, targets, g + (at + r) * dim);
      found = true;
    }
    if (found) product.read();

    math::RowScale<T> scale[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const UnitGradient<T> gradient(task, task.first + (place.has(r) ? at + r : at));
      scale[r] = scale_again(own, r, 2, T(task.eps), inverse[r]);
      radial[r] = 0;
      own.each_with(r, product, [&](int64_t d, const Vector<S, kVec>& w, const Vector<T, kVec>& v) {
#pragma unroll
        for (int e = 0; e < kVec; ++e)
          radial[r] += T(w.at[e]) * scale[r].outer * scale[r].inner * gradient(v.at[e], d + e);
      });
    }
    warp_sums(radial);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const UnitGradient<T> gradient(task, task.first + (place.has(r) ? at + r : at));
      // Every lane reads its own places of g before it writes the same of dW, which may be the same memory.
      own.each_with(r, product, [&](int64_t d, const Vector<S, kVec>& w, const Vector<T, kVec>& v) {
        Vector<S, kVec> out;
#pragma unroll
        for (int e = 0; e < kVec; ++e)
          out.at[e] = weight_gradient_at(gradient(v.at[e], d + e), w.at[e], radial[r], scale[r], T(task.eps));
        store_vector<kVec>(dw + (at + r) * dim + d, out);
      });
    }
  }
}

}  // namespace
}  // namespace nf
