// exp(x) in float32 and float64 without branches, over one value or a vector of them (V supports
// arithmetic, comparison and ?: lane by lane; U is the unsigned integer of the same width).
//   x = n ln2 + r, |r| <= ln2 / 2;  exp x = 2^n p(r). Error below 1.5 ulp.
// Below the normal range (x < -87.336, -708.396) the result is 0, above it (x > 88.7228, 709.7827) infinity, and
// NaN stays NaN. (CUDA kernels use the device's own exp.)
#pragma once

#include <cstring>

#include "math/host_device.h"

namespace nf::math {

// 2^n p in the normal range: n is added to the exponent of p. `shifted` is n + 1.5 * 2^(its mantissa's bits), whose
// low bits are n; the others leave at the top.
template <class U, int kMantissa, class V>
NF_HD V times_power_of_two(V p, V shifted) {
  U bits, power;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits = bits + (power << kMantissa);
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

template <class V, class U>
NF_HD V exp_float(V x) {
  const V magic = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const V shifted = x * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts
  V p = V{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const V y = x < -87.336f ? V{} : times_power_of_two<U, 23>(p, shifted);
  return x <= 88.7228f ? y : x * V(V{} + INFINITY);  // false for NaN, too
}

template <class V, class U>
NF_HD V exp_double(V x) {
  const V magic = V{} + 6755399441055744.0;  // 1.5 * 2^52
  const V shifted = x * 1.4426950408889634074 + magic;
  const V n = shifted - magic;
  const V r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
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
  const V y = x < -708.396 ? V{} : times_power_of_two<U, 52>(p, shifted);
  return x <= 709.7827 ? y : x * V(V{} + double(INFINITY));
}

}  // namespace nf::math
