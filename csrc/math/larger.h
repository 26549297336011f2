// The larger of two numbers; NaN is larger than any, and stays.
#pragma once

#include "math/host_device.h"

namespace nf::math {

template <class T>
NF_HD T larger(T a, T b) {
  return b > a || b != b ? b : a;
}

}  // namespace nf::math
