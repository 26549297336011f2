// 2^x by the special function unit: one instruction, error below 2 ulp.
#pragma once

#include <device/launch.cuh>

namespace nf {

// 0 where 2^x would be below the normal range of float (x < -126).
NF_DEVICE float exp2_or_zero(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace nf
