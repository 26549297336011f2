// x / ||x||, its vector-Jacobian product and the epsilon rule (NormFace section 3.1, Caffe Normalize).
//   p = 2:  n = sqrt(sum x^2 + eps)      dn/dx = x / n
//   p = 1:  n = sum |x| + eps            dn/dx = sign(x)
// eps sits INSIDE, so a zero row gives y = 0 and the finite gradient g / n(0).
#pragma once

#include "math/host_device.h"

namespace nf::math {

template <class T>
NF_HD T norm_term(int p, T x) {
  return p == 2 ? x * x : std::fabs(x);
}

template <class T>
NF_HD T norm_value(int p, T sum, T eps) {
  return p == 2 ? std::sqrt(sum + eps) : sum + eps;
}

// A row of magnitude 1e19 overflows sum x^2 in float32, one of 1e-30 loses it. Such rows are summed
// again after division by their largest entry m:  n = m * n', n' = sqrt(sum (x/m)^2 + eps/m^2).
// A lost sum far below eps changes nothing, so a small one is only rescued when eps is smaller still.
template <class T>
NF_HD bool norm_needs_rescue(int p, T sum, T eps) {
  const T high = std::is_same_v<T, double> ? T(1e300) : T(1e37);
  const T low = std::is_same_v<T, double> ? T(1e-280) : T(1e-30);
  return !(sum <= high) || (p == 2 && sum < low && eps < low && sum + eps < low);
}

// eps of a row that was divided by `largest`.
template <class T>
NF_HD T norm_scaled_eps(int p, T eps, T largest) {
  return p == 2 ? (eps / largest) / largest : eps / largest;
}

// Whether eps makes up most of the norm: a zero row, above all. Its gradient g / n may be too large for
// float16; kernels hold it at the largest half there, since an infinity would poison every step of a
// padded batch.
template <class T>
NF_HD bool ruled_by_eps(int p, T norm, T eps) {
  return p == 2 ? norm * norm <= 2 * eps : norm <= 2 * eps;
}

// dn/dx of one element, from x and y = x / n.
template <class T>
NF_HD T norm_slope(int p, T x, T y) {
  return p == 2 ? y : T((x > 0) - (x < 0));
}

// d loss / dx = (g - slope <y, g>) / n + g_norm slope, with `dot` = <y, g> over the row.
template <class T>
NF_HD T normalize_vjp(T g, T slope, T dot, T inverse_norm, T g_norm) {
  return (g - slope * dot) * inverse_norm + g_norm * slope;
}

}  // namespace nf::math
