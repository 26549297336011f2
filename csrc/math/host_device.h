// What every formula in math/ needs: one spelling for "runs on host and device", and the accumulator
// type. Nothing in this folder includes torch or touches memory: scalars in, scalars out.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define NF_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined: the CPU kernels compile the formulas once per instruction set, and an out-of-line
// copy built for a newer one could be the copy the linker keeps for all.
#define NF_HD inline __attribute__((always_inline))
#else
#define NF_HD inline
#endif

namespace nf::math {

// 16-bit storage computes in float; float and double compute in themselves. Never below float32.
template <class Stored>
using accum_t = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

template <class T>
struct ValueAndSlope {
  T value;
  T slope;
};

}  // namespace nf::math
