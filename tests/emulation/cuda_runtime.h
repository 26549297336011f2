// The CUDA runtime as csrc/cuda/host/card.h knows it, for a CPU: what may be asked of a device and of a kernel, and
// nothing else. A kernel source that allocates, waits or copies by itself does not compile here.
//
// Every question is noted, with its name, for tests of what a step asks (nf_emulation_asked).
#pragma once

#include <cstddef>

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

struct cudaDeviceProp {
  char name[256];
  int multiProcessorCount;
  std::size_t sharedMemPerBlockOptin;
  int major, minor;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* card, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

namespace nf::emulation {

// Throws where `kernel` was not allowed so many bytes of shared memory.
void check_granted(const char* name, const void* kernel, std::size_t bytes);

}  // namespace nf::emulation
