// csrc/cuda/device/launch.cuh for a CPU: every name of it, with the rules of CUDA enforced rather
// than assumed. ../block.h tells how the threads of a block are run.
#pragma once

#include <block.h>
#include <shared.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <watch.h>

#include <cstdint>
#include <functional>
#include <string>

#include "cuda/host/card.h"

#ifndef NF_NAMESPACE
#define NF_NAMESPACE normface_emulation
#endif

// The same kernels, but for CPU tensors and in a namespace of their own, so that they stand beside
// the real operators instead of in their place.
#define NF_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(NF_NAMESPACE, CPU, m)

#define NF_KERNEL(kThreads) void
#define NF_KERNEL_RESIDENT(kThreads, kBlocks) void
#define NF_DEVICE inline
#define NF_DEVICE_CHECK(condition, ...)                 \
  do {                                                  \
    if (!(condition)) nf::emulation::fail(__VA_ARGS__); \
  } while (false)

namespace nf {

using emulation::kFullMask;
using emulation::kWarp;

using emulation::block_count;
using emulation::block_count_y;
using emulation::block_id;
using emulation::block_y;
using emulation::thread_id;
using emulation::threads_per_block;
inline int lane_id() { return thread_id() % kWarp; }
inline int warp_id() { return thread_id() / kWarp; }

// Callers leave `where` alone: it is the line of the call, by which the threads that meet here can
// be seen to mean the same barrier.
inline void sync_block(emulation::Where where = emulation::Where::current()) { emulation::meet_block(where); }
inline void sync_warp(unsigned mask = kFullMask, emulation::Where where = emulation::Where::current()) {
  emulation::meet_warp("sync_warp", mask, where);
}

inline int atomic_add(int* at, int value) { return emulation::fetch_add(at, value); }
inline unsigned atomic_add(unsigned* at, unsigned value) { return emulation::fetch_add(at, value); }
inline int64_t atomic_add(int64_t* at, int64_t value) { return emulation::fetch_add(at, value); }

struct Grid {
  int64_t x;
  int64_t y = 1;
  int cluster = 1;
};

// A device of three multiprocessors, so that grid-stride loops go round and splits split even in
// small tests, with as much shared memory as a GPU may have: plan() asks the real one before it chooses.
// ../cuda_runtime.h says so when it is asked.
class Queue {
 public:
  explicit Queue(const torch::stable::Tensor&) : card_(card_of(0)) {}
  int device() const { return 0; }
  const std::string& name() const { return card_.name; }
  int multiprocessors() const { return card_.multiprocessors; }
  int shared_limit() const { return card_.shared_limit; }
  int architecture() const { return card_.architecture; }

 private:
  const Card& card_;
};

template <class... Parameters, class... Arguments>
void launch(const char* name, Queue& queue, void (*kernel)(Parameters...), Grid grid, int threads,
            size_t shared_bytes, Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument per parameter");
  if (grid.x > 0 && grid.y > 0) {
    const void* of_kernel = reinterpret_cast<const void*>(kernel);
    allow_shared(of_kernel, queue.device(), shared_bytes, name);
    emulation::check_granted(name, of_kernel, shared_bytes);
  }
  emulation::run(name, grid.x, grid.y, grid.cluster, threads, shared_bytes,
                 // The arguments are no memory of the device: nobody watches who reads them.
                 [&]()
                     __attribute__((no_sanitize_thread)) { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace nf
