// The exponentials of terms (math/terms) by the power of two that hardware has.
#pragma once

#include <device/exp2.cuh>

#include "math/softmax.h"

namespace nf {

// The rows' scale and shift have been multiplied by log2(e).
struct PowerExp {
  NF_DEVICE float scaled(float x) const { return exp2_or_zero(x); }
  NF_DEVICE float natural(float x) const { return exp2_or_zero(x * float(math::kLog2E)); }
  NF_DEVICE float root(float x) const { return std::sqrt(x); }
};

}  // namespace nf
