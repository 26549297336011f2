// What CUDA is asked about a device and about a kernel: once in the life of a process. A step asks nothing, so it
// can be captured into a graph, and its host time is that of its launches.
#pragma once

#include <cuda_runtime.h>  // the emulation has one of its own, of exactly the calls made here
#include <torch/headeronly/util/Exception.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace nf {

inline void check_cuda(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

struct Card {
  std::string name;  // as CUDA calls it
  int multiprocessors;
  int shared_limit;  // bytes of shared memory one block may ask for
  int architecture;  // 80 for compute capability 8.0
};

inline const Card& card_of(int device) {
  static std::mutex guard;
  static std::map<int, Card> known;  // whose entries stay where they are
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  cudaDeviceProp card;
  check_cuda(cudaGetDeviceProperties(&card, device), "cudaGetDeviceProperties");
  return known[device] = {card.name, card.multiProcessorCount, static_cast<int>(card.sharedMemPerBlockOptin),
                          10 * card.major + card.minor};
}

constexpr size_t kSharedWithoutAsking = 48 * 1024;

// Lets `kernel` have so many bytes of shared memory on the current device, which is `device`; `name` is what an
// error calls it. What was granted once is not asked for again.
inline void allow_shared(const void* kernel, int device, size_t bytes, const char* name) {
  if (bytes <= kSharedWithoutAsking) return;
  static std::mutex guard;
  static std::map<std::pair<const void*, int>, size_t> granted;
  const std::lock_guard<std::mutex> lock(guard);
  size_t& most = granted[{kernel, device}];
  if (most >= bytes) return;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      name);
  most = bytes;
}

}  // namespace nf
