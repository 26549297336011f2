// csrc/cuda/device/warpgroup.cuh for a CPU; ../warpgroup.h and ../factor.h have the rest.
#pragma once

#include <shared.h>
#include <warpgroup.h>

#include <device/mbarrier.cuh>
#include <device/tensor_map.cuh>
#include <type_traits>

#include "cuda/device/stored.cuh"

namespace nf {

using emulation::kWarpgroup;

inline int warpgroup_id() { return thread_id() / kWarpgroup; }

enum class Lies { kColumnsOfK, kRowsOfK };

struct Factor {
  uint64_t descriptor;
};

namespace detail {

inline uint64_t descriptor(const void* shared, int leading_bytes, int stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | uint64_t(stride_bytes / 16) << 32 | uint64_t(leading_bytes / 16) << 16 |
         uint64_t(emulation::shared_address(shared) / 16);
}

}  // namespace detail

inline Factor columns_of_k(const void* shared) { return {detail::descriptor(shared, 16, 1024)}; }
inline Factor rows_of_k(const void* shared, int box_bytes) {
  return {detail::descriptor(shared, box_bytes, 1024)};
}

struct Tf32 {};

namespace emulation {

template <class T>
constexpr Number number_of() {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16> || std::is_same_v<T, Tf32>);
  if (std::is_same_v<T, Tf32>) return Number::kTf32;
  return std::is_same_v<T, Half> ? Number::kHalf : Number::kBFloat16;
}

}  // namespace emulation

template <class... Arrays>
void wgmma_fence(Arrays&... registers) {
  emulation::fence_products({{registers, sizeof(registers)}...});
}

template <class T, Lies kA, Lies kB, int kRegisters>
void wgmma(float (&d)[kRegisters], Factor a, Factor b, bool add,
           emulation::Where where = emulation::Where::current()) {
  static_assert(!std::is_same_v<T, Tf32> || (kA == Lies::kColumnsOfK && kB == Lies::kColumnsOfK));
  emulation::start_product({emulation::number_of<T>(), add, d, kRegisters, nullptr, a.descriptor,
                            b.descriptor, kA == Lies::kRowsOfK, kB == Lies::kRowsOfK},
                           where);
}

template <class T, Lies kB, int kRegisters>
void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], Factor b, bool add,
           emulation::Where where = emulation::Where::current()) {
  static_assert(!std::is_same_v<T, Tf32> || kB == Lies::kColumnsOfK);
  emulation::start_product(
      {emulation::number_of<T>(), add, d, kRegisters, a, 0, b.descriptor, false, kB == Lies::kRowsOfK},
      where);
}

inline void wgmma_commit() { emulation::commit_products(); }

template <int kPending, class... Arrays>
void wgmma_wait(Arrays&... d) {
  emulation::wait_products(kPending, {{d, sizeof(d)}...});
}

template <int kRegisters>
void registers_down(emulation::Where where = emulation::Where::current()) {
  emulation::set_registers(false, kRegisters, where);
}
template <int kRegisters>
void registers_up(emulation::Where where = emulation::Where::current()) {
  emulation::set_registers(true, kRegisters, where);
}

inline void sync_threads(int barrier, int threads, emulation::Where where = emulation::Where::current()) {
  emulation::sync_threads(barrier, threads, where);
}
inline void arrive_threads(int barrier, int threads) { emulation::arrive_threads(barrier, threads); }

}  // namespace nf
