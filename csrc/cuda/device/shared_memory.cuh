// Shared memory of a block, carved into arrays in the order the kernel asks for them.
//
// All of it is dynamic: the launch says how many bytes, the kernel takes them. On the host, add up
// shared_bytes<T>(count) over the same arrays in the same order.
#pragma once

#include <device/launch.cuh>

namespace nf {

// Arrays begin at multiples of 16 bytes, the widest vector access.
template <class T>
constexpr __host__ __device__ size_t shared_bytes(int64_t count) {
  return (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
}

class SharedMemory {
 public:
  template <class T>
  NF_DEVICE T* take(int64_t count) {
    // 1024 bytes: where boxes begin (tensor_map.cuh).
    extern __shared__ __align__(1024) unsigned char nf_shared[];
    T* const array = reinterpret_cast<T*>(nf_shared + taken_);
    taken_ += static_cast<unsigned>(shared_bytes<T>(count));
    return array;
  }

  // Boxes of tensor_map.cuh, `count` a multiple of 1024 bytes. Before any other array: each begins at a multiple of
  // 1024 bytes then.
  template <class T>
  NF_DEVICE T* take_boxes(int64_t count) {
    return take<T>(count);
  }

 private:
  unsigned taken_ = 0;
};

}  // namespace nf
