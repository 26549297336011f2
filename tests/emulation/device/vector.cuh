// csrc/cuda/device/vector.cuh for a CPU, which would forgive the misaligned address a GPU faults on.
#pragma once

#include <device/launch.cuh>

namespace nf {

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

namespace emulation {

template <int N, class T>
void check_vector(const char* kind, const T* address) {
  constexpr size_t kBytes = sizeof(T) * N;
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
  if (reinterpret_cast<uintptr_t>(address) % kBytes != 0) {
    fail("%s of %zu bytes at %p, which is not a multiple of %zu", kind, kBytes,
         static_cast<const void*>(address), kBytes);
  }
}

}  // namespace emulation

template <int N, class T>
Vector<T, N> load_vector(const T* from) {
  emulation::check_vector<N>("load_vector", from);
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <int N, class T>
const Vector<T, N>& as_stored(const Vector<T, N>& vector) {
  return vector;
}

template <int N, class T>
void store_vector(T* to, const Vector<T, N>& vector) {
  emulation::check_vector<N>("store_vector", to);
  *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

template <int N, class T>
void store_vector_global(T* to, const Vector<T, N>& vector) {
  emulation::check_vector<N>("store_vector_global", to);
  if (emulation::is_shared(to))
    emulation::fail("store_vector_global to shared memory at %p", (const void*)to);
  *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

template <int N, class T>
void store_vector_streaming(T* to, const Vector<T, N>& vector) {
  emulation::check_vector<N>("store_vector_streaming", to);
  *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

}  // namespace nf
