// One negative agent's term in the metric losses over agents (NormFace section 4), of its cosine:
//   d = 2 - 2 c = |x_hat - w_hat|^2      h = t - d, active where h > 0
//   value = h, slope = -dvalue/dd = 1;   exponential: value = slope = exp(-d) while active
// C-contrastive has the threshold t = margin, C-triplet t = d_target + margin. What is not active has
// neither value nor slope, exactly. NaN counts as active, so that it shows.
#pragma once

#include "math/host_device.h"

namespace nf::math {

template <class V>
NF_HD V distance_of_cosine(V cosine) {
  return (cosine * -2.0f) + 2.0f;
}

template <class V>
NF_HD V hinge_excess(V threshold, V cosine) {
  return threshold - distance_of_cosine(cosine);
}

template <class T>
NF_HD bool hinge_active(T excess) {
  return !(excess <= 0);
}

template <class T>
NF_HD ValueAndSlope<T> hinge_term(bool exponential, T threshold, T cosine) {
  const T excess = hinge_excess(threshold, cosine);
  if (!hinge_active(excess)) return {T(0), T(0)};
  if (!exponential) return {excess, T(1)};
  const T e = std::exp(-distance_of_cosine(cosine));
  return {e, e};
}

}  // namespace nf::math
