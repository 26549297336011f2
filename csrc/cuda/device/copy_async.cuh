// Copies from global to shared memory that run while the thread goes on computing.
//
//   copy_async_16(…); copy_async_16(…);   start any number of copies of 16 bytes
//   copy_async_commit();                  close them into a group
//   copy_async_wait<N>();                 until all but the latest N groups have landed
//   sync_block();                         a wait covers the thread's own copies only: to read what
//                                         other threads copied, meet them afterwards
//
// Before compute capability 8.0 the copies are plain loads and stores, and the wait is nothing.
#pragma once

#include <device/launch.cuh>

namespace nf {

// Where `valid` is false nothing is read and the 16 bytes become zero.
NF_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(target), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<int4*>(shared) = valid ? *static_cast<const int4*>(global) : int4{};
#endif
}

NF_DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int N>
NF_DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
#endif
}

}  // namespace nf
