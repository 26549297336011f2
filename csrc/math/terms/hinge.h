// One negative agent's term in the metric losses over agents (NormFace section 4), of its cosine:
//   d = 2 - 2 c = |x_hat - w_hat|^2      h = t - d, active where h > 0
//   value = h, coefficient = -dvalue/dd = 1;   exponential: value = coefficient = exp(-d) while active
// The second sum counts what is active. C-contrastive has the threshold t = margin, C-triplet t = d_target +
// margin. What is not active has neither value nor coefficient, exactly. NaN counts as active, so that it shows.
#pragma once

#include "math/terms/term.h"

namespace nf::math {

template <class V>
NF_HD V distance_of_cosine(V cosine) {
  return (cosine * -2.0f) + 2.0f;
}

// t of a row, from the distance to its target.
NF_HD double hinge_threshold(double margin, bool triplet, double distance) {
  return triplet ? margin + distance : margin;
}

// d loss / d cosine of a row's target, and of the others per unit of their coefficient, from the gradients of the
// target's distance and of the row's sum. `slope` is the sum of the coefficients: in a triplet the target's
// distance is in every threshold.
struct HingeSlopes {
  double others, target;
};
NF_HD HingeSlopes hinge_slopes(double grad_distance, double grad_hinges, double slope, bool triplet) {
  return {2.0 * grad_hinges, -2.0 * (triplet ? grad_distance + grad_hinges * slope : grad_distance)};
}

template <class T, bool kExponential>
struct HingeTermOf {
  static constexpr bool kSoftmax = false, kThreshold = true;
  static constexpr int kNumbers = 0;
  T threshold;

  template <class Number>
  NF_HD HingeTermOf(const TermRow<T>& row, const Number*) : threshold(row.threshold) {}

  template <class V, class Exp>
  NF_HD Cell<V> at(V cosine, const Exp& exp) const {
    const V none{}, one = none + T(1), distance = distance_of_cosine(cosine), excess = threshold - distance;
    const V active = excess <= none ? none : one;
    if constexpr (kExponential) {
      const V e = excess <= none ? none : exp.natural(-distance);
      return {e, active, e};
    }
    return {excess <= none ? none : excess, active, active};
  }
};

template <class T>
using HingeTerm = HingeTermOf<T, false>;
template <class T>
using ExponentialHingeTerm = HingeTermOf<T, true>;

}  // namespace nf::math
