// Every class a yes or no of its own (SphereFace2): no softmax, and the sum over the classes is one of losses.
//
//   g(u) = 2 h^t - 1, h = (u + 1) / 2      z = r g(u) + offset
//   value = softplus(z), second = sigmoid(z) = d value / d offset,
//   coefficient = sigmoid(z) r g'(u) du/dc, g'(u) = t h^(t - 1), or sigmoid(z) r where the gradient is `straight`
//
// Form C: u = c, and r times a margin is in the offset. Form A: u = cos(theta - m) = c cos m + sin theta sin m.
// t is whole and at least 1: h may be below 0 by a rounding, which no other power would survive.
#pragma once

#include "math/softplus.h"
#include "math/terms/term.h"

namespace nf::math {

// The numbers common to all rows: their places in the tensor that brings them. Form C has the first four.
enum SigmoidNumber {
  kSigmoidScale,
  kSigmoidOffset,
  kSigmoidPower,
  kSigmoidStraight,
  kSigmoidNumbers,
  kSigmoidCosine = kSigmoidNumbers,  // cos m
  kSigmoidSine,                      // sin m
  kAngularSigmoidNumbers
};

// cos(theta - m), and its slope in c. At c = +-1 the slope of sin theta has no number: it is 0 where sin theta
// is so small that the roundings of c decide it, and the value is exact.
template <class T, class V, class Root>
NF_HD ValueAndSlope<V> turned_back(V c, T cosine, T sine, const Root& exp) {
  constexpr T kLeast = std::is_same_v<T, double> ? T(1e-8) : T(1e-6);  // of the square
  const V none{}, room = (none + T(1) - c) * (c + T(1));
  const V sin_theta = exp.root(room > none ? room : none);
  const V slope = room > none + kLeast ? -c / sin_theta : none;
  return {c * cosine + sin_theta * sine, slope * sine + cosine};
}

template <class T, bool kAngular>
struct SigmoidTermOf {
  static constexpr bool kSoftmax = false, kThreshold = false;
  static constexpr int kNumbers = kAngular ? kAngularSigmoidNumbers : kSigmoidNumbers;
  T r, offset;
  int power;
  bool straight;
  T cos_m = T(1), sin_m = T(0);

  template <class Number>
  NF_HD SigmoidTermOf(const TermRow<T>&, const Number* numbers)
      : r(T(numbers[kSigmoidScale])),
        offset(T(numbers[kSigmoidOffset])),
        power(int(numbers[kSigmoidPower])),
        straight(numbers[kSigmoidStraight] != Number(0)) {
    if constexpr (kAngular) {
      cos_m = T(numbers[kSigmoidCosine]);
      sin_m = T(numbers[kSigmoidSine]);
    }
  }

  // h^n, n >= 0, by squares.
  template <class V>
  static NF_HD V whole_power(V h, int n) {
    V result = V{} + T(1);
    for (V square = h; n > 0; n /= 2, square = square * square)
      if (n % 2 != 0) result = result * square;
    return result;
  }

  template <class V, class Exp>
  NF_HD ValueAndSlope<V> with_margin(V cosine, const Exp& exp) const {
    if constexpr (kAngular)
      return turned_back<T>(cosine, cos_m, sin_m, exp);
    else
      return {cosine, V{} + T(1)};
  }

  template <class V, class Exp>
  NF_HD Cell<V> at(V cosine, const Exp& exp) const {
    const ValueAndSlope<V> u = with_margin(cosine, exp);
    const V h = u.value * T(0.5) + T(0.5), slope = whole_power(h, power - 1);
    const Softplus<V> plus = softplus<T>((slope * h * T(2) - T(1)) * r + offset, exp);
    const V of_cosine = straight ? V{} + r : slope * (r * T(power)) * u.slope;
    return {plus.value, plus.slope, plus.slope * of_cosine};
  }
};

template <class T>
using SigmoidTerm = SigmoidTermOf<T, false>;
template <class T>
using AngularSigmoidTerm = SigmoidTermOf<T, true>;

}  // namespace nf::math
