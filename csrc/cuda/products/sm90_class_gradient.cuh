// dW of classes whose product with E lies in the accumulators of wgmma, without a detour through shared memory:
// class_gradient.cuh for kernels with one block on a multiprocessor, where nobody else works while a warp waits for W.
//
// A warp has 16 classes, a lane 8 n + lane % 4 * 2 + {0, 1} of the columns of two of them, lane / 4 and 8 below it. All
// loads of a class are under way at once.
#pragma once

#include "cuda/device/class_gradient.cuh"
#include "engine/tiles_sm90.h"

namespace nf {
namespace {

constexpr int kWarpClasses = 16;

// Two neighbours of a row; `vectors`: at once.
template <class S>
NF_DEVICE Vector<S, 2> load_pair(const S* from, bool vectors) {
  return vectors ? load_vector<2>(from) : Vector<S, 2>{{from[0], from[1]}};
}
template <class S>
NF_DEVICE void store_pair(S* to, const Vector<S, 2>& pair, bool vectors) {
  if (vectors) return store_vector_global<2>(to, pair);
  to[0] = pair.at[0], to[1] = pair.at[1];
}

// g += the targets of the warp's classes, of which counts[c] rows have the c-th; `row` is of kColumns, the warp's own.
template <int kColumns>
NF_DEVICE void add_held_targets(const ClassGradient& task, int64_t first, const int* counts, float* row,
                                float (&g)[kColumns / 2]) {
  const int own = lane_id() < kWarpClasses ? counts[lane_id()] : 0;
  for (unsigned left = warp_ballot(own > 0); left != 0; left &= left - 1) {
    const int c = lowest_bit(left);
    for (int d = lane_id(); d < kColumns; d += kWarp) row[d] = 0.0f;
    sync_warp();  // the zeros, before other lanes add to them
    add_targets(task, task.first + first + c, shuffle(own, c), row);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          if (c == 8 * h + lane_id() / 4) g[4 * n + 2 * h + k] += row[8 * n + lane_id() % 4 * 2 + k];
    sync_warp();  // the reads, before the next class's zeros
  }
}

// dW of the classes [first, first + kWarpClasses) of the task from g, which is spent. One warp.
template <int kColumns>
NF_DEVICE void finish_held_classes(const ClassGradient& task, int64_t first, const int* counts, float* row,
                                   float (&g)[kColumns / 2]) {
  if (task.batch > 0) add_held_targets<kColumns>(task, first, counts, row, g);
  const int first_column = lane_id() % 4 * 2;
  // Of the lane's two classes both at once, where registers have room for their rows of W; else one after the other,
  // by the same code, with the second's values moved to where the first's were.
  constexpr int kAtOnce = kColumns <= 128 ? 2 : 1;
#pragma unroll 1
  for (int round = 0; round < 2 / kAtOnce; ++round) {
    int64_t j[kAtOnce];
    bool exists[kAtOnce];
    math::RowScale<float> scale[kAtOnce];
#pragma unroll
    for (int h = 0; h < kAtOnce; ++h) {
      const int64_t place = first + 8 * (round + h) + lane_id() / 4;
      j[h] = task.first + place, exists[h] = place < task.width;
      scale[h] = quad_scale(task, place);
      if (task.uniform == nullptr) continue;
      const UnitGradient<float> gradient(task, exists[h] ? j[h] : task.first);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& value = g[4 * n + 2 * h + k];
          if (8 * n < task.dim) value = gradient(value, 8 * n + first_column + k);
        }
    }
    task.weight.visit<float>([&]<class S>(const S* weight) {
      Vector<S, 2> w[kAtOnce][kColumns / 8];
#pragma unroll
      for (int h = 0; h < kAtOnce; ++h)
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          w[h][n] = {};
          if (exists[h] && 8 * n < task.dim)
            w[h][n] = load_pair(weight + j[h] * task.dim + 8 * n + first_column, task.vectors);
        }
#pragma unroll
      for (int h = 0; h < kAtOnce; ++h) {
        float radial = 0;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
          for (int k = 0; k < 2; ++k)
            radial += float(w[h][n].at[k]) * scale[h].outer * scale[h].inner * g[4 * n + 2 * h + k];
        radial += shuffle_xor(radial, 1);
        radial += shuffle_xor(radial, 2);
        if (!exists[h]) continue;
        S* to = static_cast<S*>(task.dw.data) + (j[h] - task.dw_first) * task.dim + first_column;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          if (8 * n >= task.dim) continue;
          Vector<S, 2> out;
#pragma unroll
          for (int k = 0; k < 2; ++k)
            out.at[k] =
                weight_gradient_at(g[4 * n + 2 * h + k], w[h][n].at[k], radial, scale[h], float(task.eps));
          store_pair(to + 8 * n, out, task.vectors);
        }
      }
    });
    if constexpr (kAtOnce == 1)
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) g[4 * n] = g[4 * n + 2], g[4 * n + 1] = g[4 * n + 3];
  }
}

}  // namespace
}  // namespace nf
