// A factor of a product in shared memory, as a descriptor of wgmma says where it lies.
#pragma once

#include "warpgroup.h"

namespace nf::emulation {

struct InShared {
  uint64_t descriptor;
  bool rows_of_k;
  int rows;  // of a, or columns of b
};

// Of k, as one product takes it.
inline int depth_of(Number number) { return number == Number::kTf32 ? 8 : 16; }

// An error for any descriptor but those of boxes with a swizzle of 128 bytes.
void check_factor(const char* name, const InShared& factor);
// The factor is what `agent` reads from now on, started by so many threads.
void watch_factor(const InShared& factor, int agent, const int* starters, int count);
// values[i * row_stride + k * k_stride], as it lies there now.
void read_factor(const InShared& factor, Number number, float* values, int row_stride, int k_stride);

// One value of 16 bits.
float value_of(Number number, uint16_t bits);
// The tensor core reads sign, exponent and 10 bits.
float tf32_of(uint32_t bits);

}  // namespace nf::emulation
