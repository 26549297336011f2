// csrc/cuda/device/copy_async.cuh for a CPU, as late as the rules allow: a copy lands only in the
// wait that covers its group, and until then its place holds NaN and may not be touched.
#pragma once

#include <cstring>
#include <device/launch.cuh>

namespace nf {

inline void copy_async_16(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    emulation::fail("copy_async_16 from %p to %p: both must be multiples of 16", global, shared);
  }
  emulation::Bytes16 bytes = {};
  if (valid) memcpy(&bytes, global, sizeof(bytes));
  emulation::start_copy(shared, bytes);
}

inline void copy_async_commit() { emulation::commit_copies(); }

template <int N>
void copy_async_wait() {
  emulation::land_copies(N);
}

}  // namespace nf
