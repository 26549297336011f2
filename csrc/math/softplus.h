// softplus(z) = ln(1 + e^z) and its slope, the sigmoid, of one value or a vector of them, without branches: neither
// overflows, whatever z is. With e = e^-|z| in [0, 1],
//   softplus = max(z, 0) + ln(1 + e),   sigmoid = 1 / (1 + e) for z > 0, else e / (1 + e)
//   ln(1 + e) = 2 artanh(s) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...),   s = e / (2 + e) in [0, 1/3]
// in which no digit of a small e is lost.
#pragma once

#include "math/host_device.h"

namespace nf::math {

template <class V>
struct Softplus {
  V value;
  V slope;
};

// `exp` is what a term is given (math/terms/term.h).
template <class T, class V, class Exp>
NF_HD Softplus<V> softplus(V z, const Exp& exp) {
  // The first factor left out: (1/9)^n / (2 n + 1) is below half an ulp of 1.
  constexpr int kFactors = std::is_same_v<T, double> ? 16 : 7;
  const V none{}, one = none + T(1), positive = z > none ? z : none;
  const V e = exp.natural(z > none ? -z : z);  // NaN stays NaN
  const V s = e / (e + T(2)), square = s * s, whole = one / (e + T(1));
  V series = none + T(1) / T(2 * kFactors - 1);
  for (int n = kFactors - 1; n > 0; --n) series = series * square + T(1) / T(2 * n - 1);
  return {positive + s * series * T(2), z > none ? whole : e * whole};
}

}  // namespace nf::math
