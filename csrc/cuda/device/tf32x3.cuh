// Products of float32 on tensor cores, to the last bits of float32: every factor is split into two of tf32, and of
// the four products of the parts the three that matter are made.
//
//   x = high + low       high: x rounded to tf32, 11 bits; low: the other 12 or 13, of which tf32 has 11
//   x y = high high + (high low + low high) + O(2^-22)
//
// A tensor core cuts sums off instead of rounding them, always towards zero, so what it adds up would drift: at 512
// columns by 40 units of the last place. So kSteps steps of 8 columns are summed there, the small products first,
// where nothing of them is lost, and the sum is added in float32, which rounds. With at most two steps the error is
// below that of a float32 sum column by column (tests/test_tf32x3.py).
#pragma once

#include <cstring>
#include <device/tensor_core.cuh>

namespace nf {
namespace {

template <int kRegisters>
struct Tf32Parts {
  uint32_t high[kRegisters], low[kRegisters];

  // Three instructions. `low` keeps its last bits: mma_tf32 does not read them.
  NF_DEVICE void split(int r, float x) {
    uint32_t word;
    memcpy(&word, &x, sizeof(word));
    high[r] = (word + 0x1000u) & 0xffffe000u;  // half of the last bit that stays: to nearest
    float rounded;
    memcpy(&rounded, &high[r], sizeof(rounded));
    const float rest = x - rounded;  // exact
    memcpy(&low[r], &rest, sizeof(rest));
  }
  // Of a register as load_matrix_x4 brings it.
  NF_DEVICE void split_word(int r, uint32_t word) {
    float x;
    memcpy(&x, &word, sizeof(x));
    split(r, x);
  }
};
using Tf32Left = Tf32Parts<4>;
using Tf32Right = Tf32Parts<2>;

// sum[m] += a[m] b, over kSteps steps of 8 columns.
template <int kSteps, int kLeft>
NF_DEVICE void multiply_tf32x3(const Tf32Left (&a)[kLeft][kSteps], const Tf32Right (&b)[kSteps],
                               float (&sum)[kLeft][4]) {
  float part[kLeft][4] = {};
  const auto add = [&](const auto& multiply) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int m = 0; m < kLeft; ++m) multiply(a[m][step], b[step], part[m]);
  };
  add([](const Tf32Left& x, const Tf32Right& y, float (&to)[4]) { mma_tf32(to, x.low, y.high, to); });
  add([](const Tf32Left& x, const Tf32Right& y, float (&to)[4]) { mma_tf32(to, x.high, y.low, to); });
  add([](const Tf32Left& x, const Tf32Right& y, float (&to)[4]) { mma_tf32(to, x.high, y.high, to); });
#pragma unroll
  for (int m = 0; m < kLeft; ++m)
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[m][k] += part[m][k];
}

}  // namespace
}  // namespace nf
