// The softmax's term where classes that come too near are made nearer still: a cell past its row's threshold
// has another logit, quadratic in the cosine.
//
//   f(c) = c > threshold ? a2 c^2 + a1 c + a0 : below c
//   slope = c > threshold ? g1 c + g0 : below, f's own or one that a paper takes instead
//   E = exp(s f - kappa), S = sum E, A = sum E f, coefficient E slope
//
// CurricularFace: f = c (t + c); MV-Softmax: f = (1 + t) c + t or c + t; inter-class filter: f = 0.
#pragma once

#include "math/terms/term.h"

namespace nf::math {

// The six numbers, common to all rows: their places in the tensor that brings them.
enum HardNumber { kA2, kA1, kA0, kG1, kG0, kBelow, kHardNumbers };

template <class T>
struct HardNegativesTerm {
  static constexpr bool kSoftmax = true, kThreshold = true;
  static constexpr int kNumbers = kHardNumbers;
  TermRow<T> row;
  T a2, a1, a0, g1, g0, below;

  template <class Number>
  NF_HD HardNegativesTerm(const TermRow<T>& of_row, const Number* numbers)
      : row(of_row),
        a2(T(numbers[kA2])),
        a1(T(numbers[kA1])),
        a0(T(numbers[kA0])),
        g1(T(numbers[kG1])),
        g0(T(numbers[kG0])),
        below(T(numbers[kBelow])) {}

  template <class V>
  NF_HD V logit(V cosine) const {
    const V hard = (cosine * a2 + a1) * cosine + a0, easy = cosine * below;
    return cosine > row.threshold ? hard : easy;
  }

  template <class V, class Exp>
  NF_HD Cell<V> at(V cosine, const Exp& exp) const {
    const V f = logit(cosine), past = cosine * g1 + g0, before = V{} + below;
    const V e = exp.scaled(f * row.scale - row.shift);
    return {e, e * f, e * (cosine > row.threshold ? past : before)};
  }
};

}  // namespace nf::math
