// Sums and maxima over a warp or a block. Every lane and thread gets the same result, and the order of
// the additions is fixed: runs repeat bit by bit.
#pragma once

#include <device/launch.cuh>
#include <device/shared_memory.cuh>
#include <device/warp.cuh>

#include "math/larger.h"

namespace nf {

template <class T>
NF_DEVICE T warp_sum(T value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// Several sums at once: the shuffles of one are under way while those of the others are.
template <class T, int kCount>
NF_DEVICE void warp_sums(T (&values)[kCount]) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] += shuffle_xor(values[k], mask);
}

template <class T>
NF_DEVICE T warp_largest(T value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = math::larger(value, shuffle_xor(value, mask));
  return value;
}

// A sum of any length: kRun terms at a time in T, the runs in double. A float sum of many like terms one by one
// drifts away from them.
template <class T>
class LongSum {
 public:
  NF_DEVICE void add(T term) {
    run_ += term;
    if (++terms_ == kRun) total_ += double(run_), run_ = T(0), terms_ = 0;
  }
  NF_DEVICE double total() const { return total_ + double(run_); }
  NF_DEVICE T value() const { return T(total()); }

 private:
  static constexpr int kRun = 64;
  double total_ = 0;
  T run_ = 0;
  int terms_ = 0;
};

// `scratch` holds one value per warp. All threads of the block take part.
template <class T>
NF_DEVICE T block_sum(T value, T* scratch) {
  value = warp_sum(value);
  sync_block();  // an earlier call's reads of scratch, before this one's writes
  if (lane_id() == 0) scratch[warp_id()] = value;
  sync_block();  // the writes above, before the reads below
  T total = 0;
  for (int w = 0; w < threads_per_block() / kWarp; ++w) total += scratch[w];
  return total;
}

template <class T>
NF_DEVICE T block_largest(T value, T* scratch) {
  value = warp_largest(value);
  sync_block();  // an earlier call's reads of scratch, before this one's writes
  if (lane_id() == 0) scratch[warp_id()] = value;
  sync_block();  // the writes above, before the reads below
  T best = scratch[0];
  for (int w = 1; w < threads_per_block() / kWarp; ++w) best = math::larger(best, scratch[w]);
  return best;
}

}  // namespace nf
