// Distances between a feature x and an agent w (Caffe InnerDistance; NormFace section 4).
//   p = 2:  d = sum (x - w)^2 = |x|^2 + |w|^2 - 2 <x, w>      p = 1:  d = sum |x - w|
// The slope is that with respect to x; with respect to w it is its negative. sign(0) = 0.
#pragma once

#include "math/host_device.h"

namespace nf::math {

template <class T>
NF_HD ValueAndSlope<T> distance_term(int p, T difference) {
  if (p == 2) return {difference * difference, T(2) * difference};
  return {difference < 0 ? -difference : difference, T((difference > 0) - (difference < 0))};
}

template <class T>
NF_HD T distance_from_products(T xx, T ww, T xw) {
  return (xx + ww) - T(2) * xw;
}

// The three products cancel where x and w are close: the error is that of xx + ww, whatever is left of
// it. Below an eighth of the sum, and where the sum overflowed, d is computed from the differences. So is
// the cell's part of the gradient, 2 g (x - w): in 2 (x sum g - sum g w) it would cancel likewise.
template <class T>
NF_HD bool distance_needs_differences(T d, T xx, T ww) {
  return !(d >= T(0.125) * (xx + ww));
}

}  // namespace nf::math
