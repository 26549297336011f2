// csrc/cuda/device/shared_memory.cuh for a CPU.
//
// The count of bytes is CUDA's, but between two arrays lies a gap that belongs to neither, so that
// a step off the end of one lands in no man's land and not in the next.
#pragma once

#include <device/launch.cuh>

namespace nf {

template <class T>
constexpr size_t shared_bytes(int64_t count) {
  return (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
}

class SharedMemory {
 public:
  template <class T>
  T* take(int64_t count, emulation::Where where = emulation::Where::current()) {
    auto* array = emulation::take_shared(arrays_, taken_, static_cast<size_t>(count) * sizeof(T), where);
    taken_ += shared_bytes<T>(count);
    arrays_ += 1;
    return reinterpret_cast<T*>(array);
  }

  // Of a multiple of 1024 bytes, at one; later than other arrays it may be at none.
  template <class T>
  T* take_boxes(int64_t count, emulation::Where where = emulation::Where::current()) {
    if (taken_ % 1024 != 0 || static_cast<size_t>(count) * sizeof(T) % 1024 != 0)
      emulation::fail("take_boxes of %zu bytes after %zu: both must be multiples of 1024",
                      static_cast<size_t>(count) * sizeof(T), taken_);
    return take<T>(count, where);
  }

 private:
  size_t taken_ = 0;
  int arrays_ = 0;
};

}  // namespace nf
