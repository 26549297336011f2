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

// A row of magnitude 1e19 overflows sum x^2 in float32, one of 1e-30 loses it, and the norm of one of denormal
// numbers has no reciprocal. Such rows are summed again after multiplication by a power of two, which is exact.
// A lost sum far below eps changes nothing, so a small one is only rescued when eps is smaller still.
template <class T>
NF_HD bool norm_needs_rescue(int p, T sum, T eps) {
  constexpr bool kDouble = std::is_same_v<T, double>;
  const T high = kDouble ? T(1e300) : T(1e37);
  const T low = p == 2 ? (kDouble ? T(1e-280) : T(1e-30)) : (kDouble ? T(1e-300) : T(1e-37));
  return !(sum <= high) || (sum < low && eps < low && sum + eps < low);
}

// That power of two, 1 where none is needed. Whatever it meets is far from both ends of T, squared too.
template <class T>
NF_HD T norm_tamer(int p, T sum, T eps) {
  if (!norm_needs_rescue(p, sum, eps)) return T(1);
  if constexpr (std::is_same_v<T, double>)
    return sum < T(1) ? 0x1p700 : 0x1p-700;
  else
    return sum < T(1) ? 0x1p100f : 0x1p-100f;
}

template <class T>
constexpr T kLargestNumber = std::is_same_v<T, double> ? T(1.7976931348623157e308) : T(3.402823466e38f);

// A factor that grew out of its type, held at the largest number: infinity would turn what is zero into NaN.
template <class T>
NF_HD T held_factor(T factor) {
  return factor > kLargestNumber<T>    ? kLargestNumber<T>
         : factor < -kLargestNumber<T> ? -kLargestNumber<T>
                                       : factor;
}

// 1 / n of a row and n itself, in two factors: y = (x * outer) * inner. One factor may have no value in T.
template <class T>
struct RowScale {
  T outer;
  T inner;
  T norm;

  // 1 / n as one number.
  NF_HD T inverse() const { return held_factor(outer * inner); }
  // That of `factor` * y, for any number `factor`: `inner` of a zero row is the largest number itself.
  NF_HD RowScale times(T factor) const {
    const T product = inner * factor;
    return {outer, std::fabs(factor) <= kLargestNumber<T> ? held_factor(product) : product, norm};
  }
  // The same where float has no room for it.
  NF_HD double wide_inverse() const { return RowScale<double>{outer, inner, norm}.inverse(); }
};

// From the sum of the terms of `tamer` * x. A zero row under eps = 0 stays zero; a row with an infinity
// becomes NaN as a whole, so that it shows.
template <class T>
NF_HD RowScale<T> row_scale(int p, T eps, T tamer, T sum) {
  const T scaled = norm_value(p, sum, p == 2 ? eps * tamer * tamer : eps * tamer);
  const T inner = !(scaled <= kLargestNumber<T>) ? T(NAN)
                  : scaled == T(0)               ? kLargestNumber<T>
                                                 : T(1) / scaled;
  return {tamer, inner, scaled / tamer};
}

// Whether x times this saved 1 / n is the unit row to the last digits, and a gradient times it keeps in range
// until the scale that it still has to meet; if not, the row is scaled anew.
template <class T>
NF_HD bool inverse_serves(T inverse) {
  constexpr bool kDouble = std::is_same_v<T, double>;
  const T smallest = kDouble ? T(2.2250738585072014e-308) : T(1.1754943508e-38);
  return inverse >= smallest && inverse <= (kDouble ? T(0x1p700) : T(0x1p100f));
}

// Whether the products of a row and its gradient may be summed before the division by n: there they neither
// overflow nor vanish.
template <class T>
NF_HD bool norm_is_moderate(T norm) {
  constexpr bool kDouble = std::is_same_v<T, double>;
  return norm >= (kDouble ? T(0x1p-300) : T(0x1p-32f)) && norm <= (kDouble ? T(0x1p300) : T(0x1p32f));
}

// Whether eps makes up most of the norm: a zero row, above all. Its gradient g / n may be too large for
// float16; kernels hold it at the largest half there, since an infinity would poison every step of a
// padded batch.
template <class T>
NF_HD bool ruled_by_eps(int p, T norm, T eps) {
  return p == 2 ? norm * norm <= 2 * eps : norm <= 2 * eps;
}

// dn/dx of one element, from x and y = x / n; T may be a vector of elements.
template <class T>
NF_HD T norm_slope(int p, T x, T y) {
  return p == 2 ? y : (x > T{} ? T{} + 1 : T{}) - (x < T{} ? T{} + 1 : T{});
}

// d loss / dx = (g - slope <y, g>) / n + g_norm slope, with `dot` = <y, g> over the row and 1 / n = outer inner.
template <class T>
NF_HD T normalize_vjp(T g, T slope, T dot, T outer, T inner, T g_norm) {
  return ((g - slope * dot) * outer) * inner + g_norm * slope;
}

template <class T>
NF_HD T normalize_vjp(T g, T slope, T dot, T inverse_norm, T g_norm) {
  return normalize_vjp(g, slope, dot, inverse_norm, T(1), g_norm);
}

}  // namespace nf::math
