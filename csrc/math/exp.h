// exp(x) in float32 and float64 without branches, over one value or a vector of them (V supports
// arithmetic, comparison and ?: lane by lane; I is the integer of the same width).
//   x = n ln2 + r, |r| <= ln2 / 2;  exp x = 2^n p(r). Error below 1.5 ulp. Below the normal range (x < -87.4, -708.4) the
// result is 0, above it infinity, and NaN stays NaN. (CUDA kernels use the device's own exp.)
#pragma once

#include <cstring>

#include "math/host_device.h"

namespace nf::math {

template <class V, class I>
NF_HD V exp_float(V x) {
  const V magic = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const V low = V{} - 87.4f, high = V{} + 89.0f;  // past it the product overflows by itself
  // Both comparisons are false for NaN, which therefore passes through to p and to y.
  const V floored = x < low ? low : x;
  const V clamped = floored > high ? high : floored;
  const V shifted = clamped * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  const V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts
  V p = V{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  I bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  // 2^n in two factors, since n itself may lie outside the exponents of a normal number.
  const I whole = bits - 0x4B400000;
  const I half = whole >> 1;
  const I first_bits = (half + 127) << 23, second_bits = (whole - half + 127) << 23;
  V first, second;
  std::memcpy(&first, &first_bits, sizeof first);
  std::memcpy(&second, &second_bits, sizeof second);
  const V y = p * first * second;
  return x < low ? V{} : y;
}

template <class V, class I>
NF_HD V exp_double(V x) {
  const V magic = V{} + 6755399441055744.0;       // 1.5 * 2^52
  const V low = V{} - 708.4, high = V{} + 710.0;  // past it the product overflows by itself
  const V floored = x < low ? low : x;
  const V clamped = floored > high ? high : floored;
  const V shifted = clamped * 1.4426950408889634074 + magic;
  const V n = shifted - magic;
  const V r = (clamped - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  // Taylor to r^13: the first term left out is below 2^-57 of the sum for |r| <= ln2 / 2.
  V p = V{} + 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  I bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const I whole = bits - 0x4338000000000000;
  const I half = whole >> 1;
  const I first_bits = (half + 1023) << 52, second_bits = (whole - half + 1023) << 52;
  V first, second;
  std::memcpy(&first, &first_bits, sizeof first);
  std::memcpy(&second, &second_bits, sizeof second);
  const V y = p * first * second;
  return x < low ? V{} : y;
}

}  // namespace nf::math
