// csrc/cuda/device/warp.cuh for a CPU. Each lane brings an offer to the meeting; the last to arrive
// reads all of them and writes every lane's answer. Answers are worked out for all lanes at once
// because once a lane is on its way again its offer is gone.
#pragma once

#include <cstring>
#include <device/launch.cuh>

namespace nf {
namespace emulation {

struct Exchange {
  uint64_t value;  // the bits of what the lane brings, then of what it takes away
  int source;      // the lane it takes from
};

inline void complete_exchange(void* const* offers, unsigned mask) {
  uint64_t brought[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) brought[lane] = static_cast<Exchange*>(offers[lane])->value;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto* exchange = static_cast<Exchange*>(offers[lane]);
    exchange->value = brought[exchange->source];
  }
}

template <class T>
T exchange(const char* kind, T value, int source, unsigned mask, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "float, double, int, unsigned or int64_t");
  if (source < 0 || source >= kWarp || !(mask >> source & 1)) {
    fail("%s takes a value from lane %d, which mask %08x leaves out", kind, source, mask);
  }
  Exchange offer{0, source};
  memcpy(&offer.value, &value, sizeof(T));
  meet_warp(kind, mask, where, &offer, complete_exchange);
  memcpy(&value, &offer.value, sizeof(T));
  return value;
}

inline void complete_ballot(void* const* offers, unsigned mask) {
  uint64_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) votes |= *static_cast<uint64_t*>(offers[lane]) << lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) *static_cast<uint64_t*>(offers[lane]) = votes;
  }
}

inline unsigned ballot(const char* kind, bool predicate, unsigned mask, Where where) {
  uint64_t offer = predicate;
  meet_warp(kind, mask, where, &offer, complete_ballot);
  return static_cast<unsigned>(offer);
}

}  // namespace emulation

template <class T>
T shuffle(T value, int source_lane, unsigned mask = kFullMask,
          emulation::Where where = emulation::Where::current()) {
  return emulation::exchange("shuffle", value, source_lane, mask, where);
}

template <class T>
T shuffle_xor(T value, int lane_mask, unsigned mask = kFullMask,
              emulation::Where where = emulation::Where::current()) {
  return emulation::exchange("shuffle_xor", value, lane_id() ^ lane_mask, mask, where);
}

template <class T>
T shuffle_down(T value, int delta, unsigned mask = kFullMask,
               emulation::Where where = emulation::Where::current()) {
  const int source = lane_id() + delta < kWarp ? lane_id() + delta : lane_id();
  return emulation::exchange("shuffle_down", value, source, mask, where);
}

inline bool warp_any(bool predicate, unsigned mask = kFullMask,
                     emulation::Where where = emulation::Where::current()) {
  return emulation::ballot("warp_any", predicate, mask, where) != 0;
}
inline bool warp_all(bool predicate, unsigned mask = kFullMask,
                     emulation::Where where = emulation::Where::current()) {
  return emulation::ballot("warp_all", predicate, mask, where) == mask;
}
inline unsigned warp_ballot(bool predicate, unsigned mask = kFullMask,
                            emulation::Where where = emulation::Where::current()) {
  return emulation::ballot("warp_ballot", predicate, mask, where);
}

inline int lowest_bit(unsigned word) {
  if (word == 0) emulation::fail("lowest_bit of 0");
  return __builtin_ctz(word);
}
inline int count_bits(unsigned word) { return __builtin_popcount(word); }

}  // namespace nf
