// Values exchanged between the 32 lanes of a warp, without memory.
//
// Every lane named in `mask` must make the same call with the same mask. These calls move values;
// they do not order memory: what one lane wrote to shared memory is visible to the others only
// after sync_warp.
#pragma once

#include <device/launch.cuh>

namespace nf {

// T is float, double, int, unsigned or int64_t.
template <class T>
NF_DEVICE T shuffle(T value, int source_lane, unsigned mask = kFullMask) {
  return __shfl_sync(mask, value, source_lane);
}

template <class T>
NF_DEVICE T shuffle_xor(T value, int lane_mask, unsigned mask = kFullMask) {
  return __shfl_xor_sync(mask, value, lane_mask);
}

// Lanes too near the end to have a partner keep their own value.
template <class T>
NF_DEVICE T shuffle_down(T value, int delta, unsigned mask = kFullMask) {
  return __shfl_down_sync(mask, value, delta);
}

NF_DEVICE bool warp_any(bool predicate, unsigned mask = kFullMask) { return __any_sync(mask, predicate); }
NF_DEVICE bool warp_all(bool predicate, unsigned mask = kFullMask) { return __all_sync(mask, predicate); }
// Bit l is lane l's predicate.
NF_DEVICE unsigned warp_ballot(bool predicate, unsigned mask = kFullMask) {
  return __ballot_sync(mask, predicate);
}
// Its number, for a word that is not 0.
NF_DEVICE int lowest_bit(unsigned word) { return __ffs(static_cast<int>(word)) - 1; }
NF_DEVICE int count_bits(unsigned word) { return __popc(word); }

}  // namespace nf
