// sqrt(x) of x >= 0 in float32 and float64 without branches, over one value or a vector of them, as exp.h does
// it: a guess at 1 / sqrt(x) from the bits of x, which every step of Newton's makes twice as long, and a last
// correction. Error below 1 ulp; 0 stays 0, and NaN NaN. (CUDA kernels use the device's own.)
#pragma once

#include <cstring>

#include "math/host_device.h"

namespace nf::math {

template <int kSteps, class V, class I>
NF_HD V root_of_guess(V x, I guess) {
  V y;
  std::memcpy(&y, &guess, sizeof y);
  // x y first: of x = 0 the square of y may have no number.
  for (int i = 0; i < kSteps; ++i) y = y * (V{} + 1.5f - (x * y) * (y * 0.5f));
  const V root = x * y;
  return root + (x - root * root) * (y * 0.5f);
}

template <class V, class I>
NF_HD V root_float(V x) {
  I bits;
  std::memcpy(&bits, &x, sizeof bits);
  return root_of_guess<3>(x, 0x5F3759DF - (bits >> 1));
}

template <class V, class I>
NF_HD V root_double(V x) {
  I bits;
  std::memcpy(&bits, &x, sizeof bits);
  return root_of_guess<4>(x, 0x5FE6EB50C7B537A9 - (bits >> 1));
}

}  // namespace nf::math
