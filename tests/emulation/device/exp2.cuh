// csrc/cuda/device/exp2.cuh for a CPU.
#pragma once

#include <cmath>
#include <device/launch.cuh>
#include <limits>

namespace nf {

inline float exp2_or_zero(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}

}  // namespace nf
