// Products of bfloat16 rows by AVX512-BF16, which multiplies two pairs of numbers at a time, exactly, and adds them
// in float: twice the products of a float32 multiply-add. Rows that are bfloat16 in storage are operands as they
// are, times a power of two; their norms meet the sums. What is float, E and gradients, comes in two parts of 8
// bits, which is as fast as float32's product by the library and leaves 17 bits.
//
// The instructions take numbers below 2^-126 as zero. Rows are scaled to norms in [1, 2) first, so that nothing of
// a row is lost but what is 2^-90 of it, or of the eps in its norm.
#pragma once

#include <cstdint>

#include "cpu/stored.h"

namespace nf::cpu {

// Row r of an operand: 2^-exponent times the n numbers at data.
struct PairRow {
  const BFloat16* data;  // null: zeros
  int64_t exponent;
};

struct PairKernels {
  // Values of 4 bytes that the packed rows need.
  int64_t (*room_of_rows)(int64_t rows, int64_t n);
  int64_t (*room_across)(int64_t rows, int64_t n);
  int64_t (*room_down)(int64_t rows, int64_t n);
  // As they lie, in pairs along the row; as the columns of a product over n; as the rows of one over `count`.
  void (*pack_rows)(const PairRow* rows, int64_t count, int64_t n, uint32_t* packed);
  void (*pack_across)(const PairRow* rows, int64_t count, int64_t n, uint32_t* packed);
  void (*pack_down)(const PairRow* rows, int64_t count, int64_t n, uint32_t* packed);
  // out[i][j] = a_factor[i] b_factor[j] sum over d < n of a_id b_jd, out [a_rows, b_rows] in rows of `stride`; a by
  // pack_rows, b by pack_across.
  void (*rows_by_rows)(const uint32_t* a, const float* a_factor, int64_t a_rows, const uint32_t* b,
                       const float* b_factor, int64_t b_rows, int64_t n, float* out, int64_t stride);
  // out[i][d] += sum over j < columns of e_ij factor[j] b_jd, e [rows, columns] in rows of `stride`, out [rows, n];
  // b by pack_down. With limits, only of those e_ij factor[j] whose size is above limit[i] the lower part is added.
  void (*add_weighted_rows)(const float* e, int64_t stride, const float* factor, const float* limit,
                            int64_t rows, int64_t columns, const uint32_t* b, int64_t n, float* out);
  // out[j][d] = sum over i < rows of e_ij factor[i] b_id, e [rows, columns] in rows of `stride`, out [columns, n];
  // b by pack_down.
  void (*weighted_sums)(const float* e, int64_t stride, const float* factor, int64_t rows, int64_t columns,
                        const uint32_t* b, int64_t n, float* out);
};

namespace avx512bf16 {
// Null from a compiler that does not know the instructions.
const PairKernels* make_pair_kernels();
}  // namespace avx512bf16

}  // namespace nf::cpu
