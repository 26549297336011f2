// exp(x) in float32 and float64 without branches, over one value or a vector of them (V supports
// arithmetic, comparison and ?: lane by lane; I is the integer of the same width).
//   x = n ln2 + r, |r| <= ln2 / 2;  exp x = 2^n p(r). Error below 1.5 ulp. Below the normal range the
// result is 0, above it infinity, and NaN stays NaN. (CUDA kernels use the device's own exp.)
#pragma once

#include <cstring>

#include "math/host_device.h"

namespace nf::math {

template <class V, class I>
NF_HD V exp_float(V x) {
  const V magic = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const V low = V{} - 87.3f, high = V{} + 89.0f;  // past it the product overflows by itself
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
  // 2^128 has no float, so the factor 2^n is applied as 2^(n-1) * 2.
  const I exponent = (bits - 0x4B400000 + 126) << 23;
  V power;
  std::memcpy(&power, &exponent, sizeof power);
  const V y = p * power * 2.0f;
  return x < low ? V{} : y;
}

template <class V, class I>
NF_HD V exp_double(V x) {
  const V magic = V{} + 6755399441055744.0;       // 1.5 * 2^52
  const V low = V{} - 708.0, high = V{} + 710.0;  // past it the product overflows by itself
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
  const I exponent = (bits - 0x4338000000000000 + 1022) << 52;
  V power;
  std::memcpy(&power, &exponent, sizeof power);
  const V y = p * power * 2.0;
  return x < low ? V{} : y;
}

}  // namespace nf::math
