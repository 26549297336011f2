// csrc/cuda/device/tensor_core.cuh for a CPU. The last lane to arrive gathers the fragments into
// whole matrices, works on those, and deals the result out again; where each element lies is the
// table in the real header (PTX ISA, "Matrix Fragments for mma.m16n8k16").
//
// A tensor core adds in float, in an order of its own; here the order is that of the columns, but for tf32, whose
// kernels promise more than one rounding of their factors: there it is the hardware's.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <device/launch.cuh>

namespace nf {
namespace emulation {

struct Fragments {
  float* d;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};

// One of the two 16-bit values in a register.
template <class T>
float half_of(uint32_t word, int which) {
  T value;
  value.x = static_cast<uint16_t>(word >> (16 * which));
  return static_cast<float>(value);
}

template <class T>
void complete_mma(void* const* offers, unsigned) {
  float a[16][16];
  float b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& from = *static_cast<Fragments*>(offers[lane]);
    const int g = lane / 4;
    const int t = lane % 4;
    for (int which = 0; which < 2; ++which) {
      const int k = 2 * t + which;
      a[g][k] = half_of<T>(from.a[0], which);
      a[g + 8][k] = half_of<T>(from.a[1], which);
      a[g][k + 8] = half_of<T>(from.a[2], which);
      a[g + 8][k + 8] = half_of<T>(from.a[3], which);
      b[k][g] = half_of<T>(from.b[0], which);
      b[k + 8][g] = half_of<T>(from.b[1], which);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& to = *static_cast<Fragments*>(offers[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2);
      const int column = 2 * (lane % 4) + i % 2;
      for (int k = 0; k < 16; ++k) to.d[i] += a[row][k] * b[k][column];
    }
  }
}

inline uint32_t bits_of(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof(word));
  return word;
}

// tf32 factors: the upper 19 bits of a float.
inline float tf32_of(uint32_t word) {
  word &= 0xffffe000u;
  float value;
  memcpy(&value, &word, sizeof(value));
  return value;
}

// c + a · b of four columns in one step of the hardware: the products are exact, all five terms are cut off below
// 2^-24 of the largest exponent (of a product, the sum of its factors'), and the sum is cut off to float. That is
// compute capability 8.x, the coarsest that has tf32: 9.0 takes eight columns a step and cuts off one bit later.
// After P. Xie et al., "MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores", arXiv:2511.10909;
// M. Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7 (2021) e330.
inline float fused_step(const float* a, const float* b, float c) {
  const double terms[] = {c, double(a[0]) * b[0], double(a[1]) * b[1], double(a[2]) * b[2],
                          double(a[3]) * b[3]};
  const double exact = terms[0] + terms[1] + terms[2] + terms[3] + terms[4];
  if (!std::isfinite(exact)) return float(exact);
  const auto exponent = [](float x) { return std::max(int(bits_of(x) >> 23 & 255), 1) - 127; };
  int largest = exponent(c);
  for (int k = 0; k < 4; ++k) largest = std::max(largest, exponent(a[k]) + exponent(b[k]));
  const double units = std::ldexp(1.0, 24 - largest);
  int64_t sum = 0;
  for (const double term : terms) sum += int64_t(term * units);
  const double cut_off = double(sum) / units;
  const float nearest = float(cut_off);
  return std::fabs(double(nearest)) > std::fabs(cut_off) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct Tf32Fragments {
  float* d;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
  const float* c;     // [4]
};

inline void complete_mma_tf32(void* const* offers, unsigned) {
  float a[16][8], b[8][8];                          // b by columns
  bool row_counts[16] = {}, column_counts[8] = {};  // whether one of its values is not 0
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& from = *static_cast<Tf32Fragments*>(offers[lane]);
    const int g = lane / 4;
    const int t = lane % 4;
    for (int part = 0; part < 4; ++part) {
      const float value = a[g + part % 2 * 8][t + part / 2 * 4] = tf32_of(from.a[part]);
      row_counts[g + part % 2 * 8] |= value != 0;
    }
    for (int part = 0; part < 2; ++part) {
      const float value = b[g][t + part * 4] = tf32_of(from.b[part]);
      column_counts[g] |= value != 0;
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& to = *static_cast<Tf32Fragments*>(offers[lane]);
    for (int i = 0; i < 4; ++i) {
      const int m = lane / 4 + 8 * (i / 2), n = 2 * (lane % 4) + i % 2;
      // Padding, for the emulation's speed: zeros leave c as it is.
      const bool counts = row_counts[m] && column_counts[n];
      to.d[i] = counts ? fused_step(a[m] + 4, b[n] + 4, fused_step(a[m], b[n], to.c[i])) : to.c[i];
    }
  }
}

struct MatrixRow {
  uint32_t* r;      // [4]
  uint16_t row[8];  // what lay where this lane pointed
};

template <bool kTransposed>
void complete_load_matrix(void* const* offers, unsigned) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& to = *static_cast<MatrixRow*>(offers[lane]);
    const int g = lane / 4;
    const int t = lane % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](int row, int column) -> uint32_t {
        return static_cast<MatrixRow*>(offers[8 * matrix + row])->row[column];
      };
      const uint32_t low = kTransposed ? element(2 * t, g) : element(g, 2 * t);
      const uint32_t high = kTransposed ? element(2 * t + 1, g) : element(g, 2 * t + 1);
      to.r[matrix] = low | high << 16;
    }
  }
}

inline void load_matrix(const char* kind, uint32_t (&r)[4], const void* row, Where where,
                        void (*complete)(void* const*, unsigned)) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail("%s of a row at %p, which is not a multiple of 16", kind, row);
  }
  if (!is_in_one_array(row, 16)) fail("%s of a row at %p, which is in no shared array", kind, row);
  MatrixRow offer{r, {}};
  memcpy(offer.row, row, sizeof(offer.row));
  meet_warp(kind, kFullMask, where, &offer, complete);
}

}  // namespace emulation

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    emulation::Where where = emulation::Where::current()) {
  emulation::Fragments offer{d, a, b};
  emulation::meet_warp("mma_f16", kFullMask, where, &offer, emulation::complete_mma<torch::headeronly::Half>);
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     emulation::Where where = emulation::Where::current()) {
  emulation::Fragments offer{d, a, b};
  emulation::meet_warp("mma_bf16", kFullMask, where, &offer,
                       emulation::complete_mma<torch::headeronly::BFloat16>);
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                     emulation::Where where = emulation::Where::current()) {
  emulation::Tf32Fragments offer{d, a, b, c};
  emulation::meet_warp("mma_tf32", kFullMask, where, &offer, emulation::complete_mma_tf32);
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* shared_row,
                           emulation::Where where = emulation::Where::current()) {
  emulation::load_matrix("load_matrix_x4", r, shared_row, where, emulation::complete_load_matrix<false>);
}

inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row,
                                      emulation::Where where = emulation::Where::current()) {
  emulation::load_matrix("load_matrix_x4_transposed", r, shared_row, where,
                         emulation::complete_load_matrix<true>);
}

}  // namespace nf
