// Barriers in shared memory that count arrivals and the bytes of bulk copies (compute capability 9.0).
//
// A phase is over when as many threads have arrived as `barrier_init` named, and all bytes that were expected have
// come. Then the next begins by itself. `barrier_wait(b, p)` passes once the phase of parity p is over: the first
// phase of a barrier has parity 0, and on a fresh barrier a wait for parity 1 passes at once. Who waits in a ring of
// stages turns the parity whenever the ring begins anew (RingPlace).
//
// What threads did before they arrived, and what bulk copies wrote whose bytes were counted, happened before
// whatever follows a wait.
#pragma once

#include <device/launch.cuh>

namespace nf {

struct alignas(8) Barrier {
  uint64_t state;
};

// How often a wait has given up on this device (barrier_wait). One count a source file: a kernel asks its own.
static __device__ unsigned nf_barrier_failures;

namespace detail {

NF_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

}  // namespace detail

// One thread, before the block meets (fence_barriers, then sync_block).
NF_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :
               : "r"(detail::shared_address(barrier)), "r"(arrivals)
               : "memory");
#else
  __trap();
#endif
}

// By the thread that made the barriers, after the last: bulk copies see them from here on.
NF_DEVICE void fence_barriers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

NF_DEVICE void barrier_arrive(Barrier* barrier) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
               :
               : "r"(detail::shared_address(barrier))
               : "memory");
#endif
}

// Arrives, and the phase waits for so many bytes of bulk copies too. Bytes beyond the edge of a matrix count.
NF_DEVICE void barrier_arrive_expect(Barrier* barrier, unsigned bytes) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(detail::shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// A wait of some seconds means a fault in the kernel. A trap inside the loop would cost registers in every kernel, and
// a loop without an end the device: so the wait gives up, what it was for is wrong, and `barriers_held` says so. By the
// clock, in its steps of 2^32 ns, after 4 to 9 seconds: a try may end sooner than it was told.
NF_DEVICE void barrier_wait(Barrier* barrier, unsigned parity) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint32_t address = detail::shared_address(barrier);
  constexpr unsigned kNanoseconds = 10'000'000;
  unsigned last = 0;  // when to give up, known once a try has failed
  while (true) {
    uint32_t over, now;
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(over)
        : "r"(address), "r"(parity), "r"(kNanoseconds)
        : "memory");
    if (over != 0) return;
    asm volatile("mov.u32 %0, %%globaltimer_hi;" : "=r"(now));
    if (last == 0) last = now + 2;
    if (int(now - last) >= 0) break;
    if (*const_cast<volatile unsigned*>(&nf_barrier_failures) != 0) break;  // another has given up before
  }
  atomicAdd(&nf_barrier_failures, 1u);
#endif
}

// The last line of a kernel with waits: one that has given up ends the process's use of the device, as a failed check
// does, for what it has written is wrong.
NF_DEVICE void barriers_held() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (*const_cast<volatile unsigned*>(&nf_barrier_failures) != 0) __trap();
#endif
}

// Where a ring of kStages stages stands: the stage, and the parity of the phase that its user waits for.
template <int kStages>
struct RingPlace {
  int stage = 0;
  unsigned parity;

  // Consumers wait for the first filling: 0. Producers wait for a stage to be free, which all are at first: 1.
  NF_DEVICE explicit RingPlace(unsigned first) : parity(first) {}
  NF_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

}  // namespace nf
