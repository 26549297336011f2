// Launching a kernel, and what a thread may ask about where it stands.
//
// Kernel sources reach CUDA only through <device/*.cuh>. The angle brackets are deliberate: a test
// build puts another directory with the same names in front and runs the very same kernels on a
// CPU, thread by thread. Whatever is added here must therefore be added there too
// (tests/emulation/device); a test compiles one source against both.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdio>
#include <limits>

#include "cuda/host/card.h"

#ifndef NF_NAMESPACE
#define NF_NAMESPACE normface_ext
#endif

// NF_CUDA_LIBRARY(m) { m.impl("op", TORCH_BOX(&op_cuda)); } registers CUDA kernels of one file.
#define NF_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(NF_NAMESPACE, CUDA, m)

// template <class T> NF_KERNEL(256) name(arguments) { … }: the bound is the largest block size the
// kernel is ever launched with, from which the compiler knows how many registers it may spend.
#define NF_KERNEL(kThreads) __global__ void __launch_bounds__(kThreads)
// The same with kBlocks of them on a multiprocessor at once, where shared memory allows it.
#define NF_KERNEL_RESIDENT(kThreads, kBlocks) __global__ void __launch_bounds__(kThreads, kBlocks)
#define NF_DEVICE __device__ __forceinline__

// Stops the kernel with a sentence when what the caller promised does not hold. The trap makes the
// CUDA context unusable, as every device-side assertion does; nothing gentler can leave a kernel.
#define NF_DEVICE_CHECK(condition, format, ...)                                                     \
  do {                                                                                              \
    if (!(condition)) {                                                                             \
      printf("block (%lld, %lld), thread %d: " format "\n", static_cast<long long>(nf::block_id()), \
             static_cast<long long>(nf::block_y()), nf::thread_id(), ##__VA_ARGS__);                \
      __trap();                                                                                     \
    }                                                                                               \
  } while (false)

namespace nf {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

NF_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
NF_DEVICE int threads_per_block() { return static_cast<int>(blockDim.x); }
NF_DEVICE int lane_id() { return thread_id() % kWarp; }
NF_DEVICE int warp_id() { return thread_id() / kWarp; }

// 64 bits at once, so that block_id() * anything cannot overflow by an oversight.
NF_DEVICE int64_t block_id() { return blockIdx.x; }
NF_DEVICE int64_t block_count() { return gridDim.x; }
NF_DEVICE int64_t block_y() { return blockIdx.y; }
NF_DEVICE int64_t block_count_y() { return gridDim.y; }

NF_DEVICE void sync_block() { __syncthreads(); }
NF_DEVICE void sync_warp(unsigned mask = kFullMask) { __syncwarp(mask); }

// Integers only: the order of atomic additions is not fixed, and a float sum depends on it.
NF_DEVICE int atomic_add(int* at, int value) { return atomicAdd(at, value); }
NF_DEVICE unsigned atomic_add(unsigned* at, unsigned value) { return atomicAdd(at, value); }
NF_DEVICE int64_t atomic_add(int64_t* at, int64_t value) {
  return static_cast<int64_t>(
      atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value)));
}

struct Grid {
  int64_t x;
  int64_t y = 1;
  int cluster = 1;  // neighbours along x that run together (cluster.cuh): x is a multiple of it
};

// The device a tensor lives on, made current for as long as this object lives, and the stream
// PyTorch is recording on there. Make one before the first allocation of an op.
class Queue {
 public:
  explicit Queue(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_), card_(card_of(device_)) {
    // The guard moves PyTorch's copy of the CUDA runtime to the device. Ours is linked statically
    // and keeps its own idea of the current device, so it is told as well.
    check_cuda(cudaSetDevice(device_), "cudaSetDevice");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }
  int device() const { return device_; }
  const std::string& name() const { return card_.name; }
  int multiprocessors() const { return card_.multiprocessors; }
  int shared_limit() const { return card_.shared_limit; }
  int architecture() const { return card_.architecture; }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  const Card& card_;
  cudaStream_t stream_ = nullptr;
};

// Runs `kernel` on every block of the grid; `name` is what an error will call it. Arguments are
// converted to the kernel's own parameter types. An empty grid is no work, not an error.
template <class... Parameters, class... Arguments>
void launch(const char* name, Queue& queue, void (*kernel)(Parameters...), Grid grid, int threads,
            size_t shared_bytes, Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument per parameter");
  STD_TORCH_CHECK(
      grid.x >= 0 && grid.x <= std::numeric_limits<int32_t>::max() && grid.y >= 0 && grid.y <= 65535, name,
      ": expected a grid of at most 2147483647 x 65535 blocks, got ", grid.x, " x ", grid.y);
  if (grid.x == 0 || grid.y == 0) return;

  allow_shared(reinterpret_cast<const void*>(kernel), queue.device(), shared_bytes, name);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  if (grid.cluster == 1) {
    kernel<<<blocks, static_cast<unsigned>(threads), shared_bytes, queue.stream()>>>(
        static_cast<Parameters>(arguments)...);
    return check_cuda(cudaGetLastError(), name);
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = queue.stream();
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace nf
