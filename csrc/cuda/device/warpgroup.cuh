// Matrix products of a warpgroup, four warps that stand together, on Hopper's tensor cores (wgmma, compute capability
// 9.0, built as sm_90a), and what else warpgroups do.
//
//   wgmma_fence(d);                 before the first product of a chain, and after registers of d (or a) were touched
//   wgmma<…>(d, a, b, add); …       start products d[64, kN] = (add ? d : 0) + a[64, k] b[k, kN]
//   wgmma_commit();                 close them into a group
//   wgmma_wait<kPending>(d);        until all but the latest kPending groups are done; d may be read then. Names every
//                                   array that this gives back
//
// Until the wait neither d nor the factors may be touched. k is 16 for 16-bit factors, 8 for tf32.
//
// d of thread t, with w = t % 128 / 32 and l = t % 32: d[4 j + 2 h + b] is row 16 w + 8 h + l / 4, column
// 8 j + 2 (l % 4) + b. A factor a in registers lies as in tensor_core.cuh, of the warp's 16 rows.
//
// Factors in shared memory are boxes of tensor_map.cuh: rows of 128 bytes, swizzled, at multiples of 1024 bytes.
// `columns_of_k`: a row of the box is a row of a (or a column of b) and holds 64 values of k (32 of tf32); further rows
// follow, the next k are 16 values (32 bytes) on, and past the box's width in the next box. `rows_of_k`, for 16-bit
// factors: a row of the box is one k, and holds 64 rows of a (or columns of b); the next 64 lie `box_bytes` on in the
// next box, the next k sixteen rows (2048 bytes) on.
#pragma once

#include <device/mbarrier.cuh>
#include <device/tensor_map.cuh>
#include <type_traits>

#include "cuda/device/stored.cuh"

namespace nf {

constexpr int kWarpgroup = 128;

NF_DEVICE int warpgroup_id() { return thread_id() / kWarpgroup; }

// Which way a factor lies.
enum class Lies { kColumnsOfK, kRowsOfK };

// Where a factor begins, as wgmma takes it.
struct Factor {
  uint64_t descriptor;
};

namespace detail {

NF_DEVICE uint64_t descriptor(const void* shared, int leading_bytes, int stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | uint64_t(stride_bytes / 16) << 32 | uint64_t(leading_bytes / 16) << 16 |
         uint64_t((shared_address(shared) & 0x3ffff) / 16);
}

}  // namespace detail

NF_DEVICE Factor columns_of_k(const void* shared) { return {detail::descriptor(shared, 16, 1024)}; }
NF_DEVICE Factor rows_of_k(const void* shared, int box_bytes) {
  return {detail::descriptor(shared, box_bytes, 1024)};
}

// How a factor of floats, of which the tensor core reads sign, exponent and 10 bits, is named.
struct Tf32 {};

// Text and operands of an asm statement with so many registers of d.
#define NF_WGMMA_TEXT_64                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NF_WGMMA_TEXT_128                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NF_WGMMA_TEXT_192                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, " \
  "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
  "%87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NF_WGMMA_TEXT_256                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, " \
  "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
  "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "   \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "  \
  "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define NF_WGMMA_8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define NF_WGMMA_32(d, i) NF_WGMMA_8(d, i), NF_WGMMA_8(d, i + 8), NF_WGMMA_8(d, i + 16), NF_WGMMA_8(d, i + 24)
#define NF_WGMMA_DATA_64(d) NF_WGMMA_32(d, 0)
#define NF_WGMMA_DATA_128(d) NF_WGMMA_DATA_64(d), NF_WGMMA_32(d, 32)
#define NF_WGMMA_DATA_192(d) NF_WGMMA_DATA_128(d), NF_WGMMA_32(d, 64)
#define NF_WGMMA_DATA_256(d) NF_WGMMA_DATA_192(d), NF_WGMMA_32(d, 96)

// After the registers of d come %P0 … %P6: a and b, whether to add, how they lie.
#define NF_WGMMA_OF(N, P0, P1, P2, P3, P4, P5, P6)                                                          \
  template <>                                                                                               \
  struct Wgmma<N> {                                                                                         \
    template <class T, int kTurnA, int kTurnB>                                                              \
    NF_DEVICE static void run(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {                         \
      if constexpr (std::is_same_v<T, Tf32>)                                                                \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " P2                                             \
                     ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N "k8.f32.tf32.tf32 {" NF_WGMMA_TEXT_##N  \
                     "}, " P0 ", " P1 ", p, 1, 1;\n\t}"                                                     \
                     : NF_WGMMA_DATA_##N(d)                                                                 \
                     : "l"(a), "l"(b), "r"(add));                                                           \
      else if constexpr (std::is_same_v<T, Half>)                                                           \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " P2                                             \
                     ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" NF_WGMMA_TEXT_##N   \
                     "}, " P0 ", " P1 ", p, 1, 1, " P3 ", " P4 ";\n\t}"                                     \
                     : NF_WGMMA_DATA_##N(d)                                                                 \
                     : "l"(a), "l"(b), "r"(add), "n"(kTurnA), "n"(kTurnB));                                 \
      else                                                                                                  \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " P2                                             \
                     ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NF_WGMMA_TEXT_##N \
                     "}, " P0 ", " P1 ", p, 1, 1, " P3 ", " P4 ";\n\t}"                                     \
                     : NF_WGMMA_DATA_##N(d)                                                                 \
                     : "l"(a), "l"(b), "r"(add), "n"(kTurnA), "n"(kTurnB));                                 \
    }                                                                                                       \
    template <class T, int kTurnB>                                                                          \
    NF_DEVICE static void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {             \
      if constexpr (std::is_same_v<T, Tf32>)                                                                \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " P5                                             \
                     ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N "k8.f32.tf32.tf32 {" NF_WGMMA_TEXT_##N  \
                     "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1;\n\t}"                           \
                     : NF_WGMMA_DATA_##N(d)                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                       \
      else if constexpr (std::is_same_v<T, Half>)                                                           \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " P5                                             \
                     ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" NF_WGMMA_TEXT_##N   \
                     "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, " P6 ";\n\t}"                   \
                     : NF_WGMMA_DATA_##N(d)                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTurnB));          \
      else                                                                                                  \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " P5                                             \
                     ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NF_WGMMA_TEXT_##N \
                     "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, " P6 ";\n\t}"                   \
                     : NF_WGMMA_DATA_##N(d)                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTurnB));          \
    }                                                                                                       \
  };

namespace detail {

template <int kN>
struct Wgmma;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
NF_WGMMA_OF(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
NF_WGMMA_OF(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
NF_WGMMA_OF(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
NF_WGMMA_OF(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
#endif
#undef NF_WGMMA_OF
#undef NF_WGMMA_8
#undef NF_WGMMA_32
#undef NF_WGMMA_DATA_64
#undef NF_WGMMA_DATA_128
#undef NF_WGMMA_DATA_192
#undef NF_WGMMA_DATA_256

// No register is read or written across this line.
NF_DEVICE void hold(float& of_d) { asm volatile("" : "+f"(of_d)::"memory"); }
NF_DEVICE void hold(uint32_t& of_a) { asm volatile("" : "+r"(of_a)::"memory"); }
template <class T, int kCount>
NF_DEVICE void hold(T (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) hold(registers[i]);
}

}  // namespace detail

// Names every array of d and, where a is in registers, of a: also arrays of such arrays.
template <class... Arrays>
NF_DEVICE void wgmma_fence(Arrays&... registers) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  (detail::hold(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// T: Half, BFloat16, or Tf32, of which both factors lie as columns of k.
template <class T, Lies kA, Lies kB, int kRegisters>
NF_DEVICE void wgmma(float (&d)[kRegisters], Factor a, Factor b, bool add) {
  static_assert(!std::is_same_v<T, Tf32> || (kA == Lies::kColumnsOfK && kB == Lies::kColumnsOfK));
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  detail::Wgmma<2 * kRegisters>::template run<T, int(kA), int(kB)>(d, a.descriptor, b.descriptor, int(add));
#else
  __trap();
#endif
}

// a in registers.
template <class T, Lies kB, int kRegisters>
NF_DEVICE void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], Factor b, bool add) {
  static_assert(!std::is_same_v<T, Tf32> || kB == Lies::kColumnsOfK);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  detail::Wgmma<2 * kRegisters>::template run<T, int(kB)>(d, a, b.descriptor, int(add));
#else
  __trap();
#endif
}

NF_DEVICE void wgmma_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int kPending, class... Arrays>
NF_DEVICE void wgmma_wait(Arrays&... d) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
  (detail::hold(d), ...);
#endif
}

// Registers of each thread of the calling warpgroup, a multiple of 8 from 24 to 240: given back, or taken once others
// gave theirs back. What a block was launched with has to suffice for all its warpgroups together.
template <int kRegisters>
NF_DEVICE void registers_down() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
#endif
}
template <int kRegisters>
NF_DEVICE void registers_up() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
#endif
}

// Barriers of some warps of a block, 1 … 15 (0 is sync_block's): the phase ends when so many threads, those that only
// arrive among them, have come.
NF_DEVICE void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}
NF_DEVICE void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

}  // namespace nf
