// csrc/cuda/device/mbarrier.cuh for a CPU. A wait that would give up on a GPU is a deadlock here, and an error that says
// who waits where; ../mbarrier.h has the rest.
#pragma once

#include <mbarrier.h>

#include <device/launch.cuh>

namespace nf {

struct alignas(8) Barrier {
  uint64_t state;
};

inline void barrier_init(Barrier* barrier, int arrivals) { emulation::init_barrier(barrier, arrivals); }
inline void fence_barriers() { emulation::fence_made_barriers(); }
inline void barrier_arrive(Barrier* barrier) { emulation::arrive_at_barrier(barrier, 0); }
inline void barrier_arrive_expect(Barrier* barrier, unsigned bytes) {
  emulation::arrive_at_barrier(barrier, bytes);
}
inline void barrier_wait(Barrier* barrier, unsigned parity,
                         emulation::Where where = emulation::Where::current()) {
  emulation::wait_at_barrier(barrier, parity, where);
}
inline void barriers_held() { emulation::hear_of_waits(); }

template <int kStages>
struct RingPlace {
  int stage = 0;
  unsigned parity;

  explicit RingPlace(unsigned first) : parity(first) {}
  void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

}  // namespace nf
