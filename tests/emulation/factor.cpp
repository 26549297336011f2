#include "factor.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cstring>

#include "shared.h"
#include "watch.h"

namespace nf::emulation {
namespace {

constexpr uint32_t kAtom = 1024;  // 8 rows of 128 bytes, in which the swizzle repeats
constexpr uint32_t kChunk = 16;   // bytes the swizzle leaves together

struct Descriptor {
  uint32_t begin, leading, stride, base_offset, layout, rest;
};
Descriptor parts_of(uint64_t bits) {
  const auto field = [&](int from, int count) {
    return uint32_t(bits >> from & ((uint64_t{1} << count) - 1));
  };
  return {.begin = field(0, 14) * 16,
          .leading = field(16, 14) * 16,
          .stride = field(32, 14) * 16,
          .base_offset = field(49, 3),
          .layout = field(62, 2),
          .rest = field(14, 2) | field(30, 2) | field(46, 3) | field(52, 10)};
}

// Calls f(where, row, k) for each 16 bytes of the factor: of one row, or of one k.
template <class F>
void for_each_chunk(const InShared& factor, const F& f) {
  const Descriptor d = parts_of(factor.descriptor);
  const auto visit = [&](uint32_t address, int row, int k) {
    f(at_shared_address(address ^ (address / 128 % 8) * kChunk), row, k);
  };
  if (factor.rows_of_k) {
    for (int k = 0; k < 16; ++k)
      for (int row = 0; row < factor.rows; row += 8)
        visit(d.begin + row / 64 * d.leading + k / 8 * d.stride + k % 8 * 128 + row % 64 * 2, row, k);
  } else {
    for (int row = 0; row < factor.rows; ++row)
      for (uint32_t half = 0; half < 2; ++half)
        visit(d.begin + row / 8 * d.stride + row % 8 * 128 + half * kChunk, row, half);
  }
}

}  // namespace

float value_of(Number number, uint16_t bits) {
  if (number == Number::kBFloat16) return std::bit_cast<float>(uint32_t{bits} << 16);
  torch::headeronly::Half half;
  half.x = bits;
  return static_cast<float>(half);
}

float tf32_of(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

void check_factor(const char* name, const InShared& factor) {
  const Descriptor d = parts_of(factor.descriptor);
  if (d.layout != 1 || d.base_offset != 0 || d.rest != 0)
    fail("wgmma: descriptor %016lx of %s is not of the layout with a swizzle of 128 bytes",
         static_cast<unsigned long>(factor.descriptor), name);
  const bool strides = d.stride == kAtom &&
                       (factor.rows_of_k ? d.leading % kAtom == 0 && d.leading != 0 : d.leading == kChunk);
  if (!strides)
    fail("wgmma: %s lies as %s, whose descriptor cannot have a leading offset of %u and a stride of %u bytes",
         name, factor.rows_of_k ? "rows of k" : "columns of k", d.leading, d.stride);
  const uint32_t within = d.begin % kAtom;
  if (factor.rows_of_k ? within != 0 : within >= 128 || within % 32 != 0)
    fail("wgmma: %s lies as %s and cannot begin %u bytes after a multiple of %u", name,
         factor.rows_of_k ? "rows of k" : "columns of k", within, kAtom);
}

void watch_factor(const InShared& factor, int agent, const int* starters, int count) {
  for_each_chunk(factor,
                 [&](const unsigned char* at, int, int) { agent_reads(agent, at, kChunk, starters, count); });
}

void read_factor(const InShared& factor, Number number, float* values, int row_stride, int k_stride) {
  for_each_chunk(factor, [&](const unsigned char* at, int row, int k) {
    if (number == Number::kTf32) {
      uint32_t words[4];
      memcpy(words, at, sizeof(words));
      for (int i = 0; i < 4; ++i) values[row * row_stride + (4 * k + i) * k_stride] = tf32_of(words[i]);
      return;
    }
    uint16_t halves[8];
    memcpy(halves, at, sizeof(halves));
    for (int i = 0; i < 8; ++i) {
      const int of_row = factor.rows_of_k ? row + i : row;
      const int of_k = factor.rows_of_k ? k : 8 * k + i;
      values[of_row * row_stride + of_k * k_stride] = value_of(number, halves[i]);
    }
  });
}

}  // namespace nf::emulation
