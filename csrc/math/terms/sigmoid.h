// Every class a yes or no of its own (SphereFace2): no softmax, and the sum over the classes is one of losses.
//
//   g(c) = 2 h^t - 1, h = (c + 1) / 2      z = r g(c) + offset, r times a margin and a bias in the offset
//   value = softplus(z), second = sigmoid(z) = d value / d offset,
//   coefficient = sigmoid(z) r g'(c), g'(c) = t h^(t - 1), or 1 in its place where the gradient is `straight`
//
// t is whole and at least 1: h may be below 0 by a rounding, which no other power would survive.
#pragma once

#include "math/softplus.h"
#include "math/terms/term.h"

namespace nf::math {

// The numbers common to all rows: their places in the tensor that brings them.
enum SigmoidNumber { kSigmoidScale, kSigmoidOffset, kSigmoidPower, kSigmoidStraight, kSigmoidNumbers };

template <class T>
struct SigmoidTerm {
  static constexpr bool kSoftmax = false, kThreshold = false;
  static constexpr int kNumbers = kSigmoidNumbers;
  T r, offset;
  int power;
  bool straight;

  template <class Number>
  NF_HD SigmoidTerm(const TermRow<T>&, const Number* numbers)
      : r(T(numbers[kSigmoidScale])),
        offset(T(numbers[kSigmoidOffset])),
        power(int(numbers[kSigmoidPower])),
        straight(numbers[kSigmoidStraight] != Number(0)) {}

  // h^n, n >= 0, by squares.
  template <class V>
  static NF_HD V whole_power(V h, int n) {
    V result = V{} + T(1);
    for (V square = h; n > 0; n /= 2, square = square * square)
      if (n % 2 != 0) result = result * square;
    return result;
  }

  template <class V, class Exp>
  NF_HD Cell<V> at(V cosine, const Exp& exp) const {
    const V h = cosine * T(0.5) + T(0.5), slope = whole_power(h, power - 1);
    const Softplus<V> plus = softplus<T>((slope * h * T(2) - T(1)) * r + offset, exp);
    const V of_cosine = straight ? V{} + r : slope * (r * T(power));
    return {plus.value, plus.slope, plus.slope * of_cosine};
  }
};

}  // namespace nf::math
