// The products of pairs for AVX512-BF16. GCC takes the target before any include, for the whole file; clang takes
// it as an attribute on the functions that follow. No standard templates in here, see rows.inc.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
// Of GCC 12's own header, whose undefined vectors are initialised with themselves.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "cpu/pairs.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#endif

namespace nf::cpu::avx512bf16 {
namespace {

constexpr int64_t kLanes = 16;  // pairs in a vector
// Rows and vectors of columns of a block whose sums stay in registers: 24 of 32.
constexpr int kRows = 8, kVectors = 3;
constexpr int64_t kPanel = kVectors * kLanes;
// Pairs that are added before they join what was added earlier: a short chain rounds less, and this much of both
// operands of a block stays in the first cache.
constexpr int64_t kChain = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
__mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? __mmask16(0xFFFF) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

__m512bh as_pairs(__m512i v) { return (__m512bh)v; }
__m512i as_bits(__m512bh v) { return (__m512i)v; }

// Numbers 0, distance, 1, 1 + distance, ... of first + them.
struct Interleaved {
  alignas(64) int16_t place[32];
  constexpr Interleaved(int first, int distance) : place() {
    for (int k = 0; k < 32; ++k) place[k] = int16_t(first + k / 2 + (k % 2) * distance);
  }
  __m512i load() const { return _mm512_load_si512(place); }
};
constexpr Interleaved kHalves(0, 16), kLowHalves(0, 32), kHighHalves(16, 32);

// One operand of a block: pair k of row r, part p, at data[r * row_step + k * pair_step + p * part_step].
struct Factor {
  const uint32_t* data;
  int64_t row_step, pair_step, part_step;
};

// out[r][...] (+)= the sum over `pairs` of a's parts times b, [pairs, vectors * 16].
template <int rows, int vectors, int parts>
void block(const Factor& a, const uint32_t* b, int64_t pairs, float* out, int64_t stride, __mmask16 last,
           bool add) {
  __m512 sum[rows][vectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_setzero_ps();
  const uint32_t* at = a.data;
  for (int64_t k = 0; k < pairs; ++k, at += a.pair_step, b += vectors * kLanes) {
    __m512i column[vectors];
    for (int v = 0; v < vectors; ++v) column[v] = _mm512_loadu_si512(b + v * kLanes);
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < parts; ++p) {
        const __m512i pair = _mm512_set1_epi32(int(at[r * a.row_step + p * a.part_step]));
        for (int v = 0; v < vectors; ++v)
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], as_pairs(pair), as_pairs(column[v]));
      }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      const __mmask16 mask = v + 1 < vectors ? __mmask16(0xFFFF) : last;
      float* to = out + r * stride + v * kLanes;
      if (add) sum[r][v] = _mm512_add_ps(sum[r][v], _mm512_maskz_loadu_ps(mask, to));
      _mm512_mask_storeu_ps(to, mask, sum[r][v]);
    }
}

template <int n>
struct Size {
  static constexpr int value = n;
};

// The same for up to kRows rows.
template <int vectors, int parts>
void some_rows(Factor a, int64_t rows, const uint32_t* b, int64_t pairs, float* out, int64_t stride,
               __mmask16 last, bool add) {
  const auto take = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    if (rows < kSize) return;
    block<kSize, vectors, parts>(a, b, pairs, out, stride, last, add);
    a.data += kSize * a.row_step;
    out += kSize * stride;
    rows -= kSize;
  };
  take(Size<kRows>());
  take(Size<4>());
  take(Size<2>());
  take(Size<1>());
}

// Operand b: panels of kPanel columns one behind another, the last of as few vectors as hold its columns. In a
// panel [pairs, columns].
struct Panel {
  const uint32_t* data;
  int64_t first, columns, vectors;

  Panel(const uint32_t* b, int64_t number, int64_t all_columns, int64_t all_pairs)
      : data(b + number * kPanel * all_pairs),
        first(number * kPanel),
        columns(at_most(kPanel, all_columns - first)),
        vectors(ceil_div(columns, kLanes)) {}
};

template <int parts>
void rows_of_panel(const Factor& a, int64_t rows, const Panel& b, int64_t first_pair, int64_t pairs,
                   float* out, int64_t stride, bool add) {
  const uint32_t* columns = b.data + first_pair * b.vectors * kLanes;
  const __mmask16 last = first_lanes(b.columns - (b.vectors - 1) * kLanes);
  const auto run = [&](auto vectors) {
    some_rows<decltype(vectors)::value, parts>(a, rows, columns, pairs, out + b.first, stride, last, add);
  };
  if (b.vectors == 3)
    run(Size<3>());
  else if (b.vectors == 2)
    run(Size<2>());
  else
    run(Size<1>());
}

void rows_by_rows(const uint32_t* a, const float* a_factor, int64_t a_rows, const uint32_t* b,
                  const float* b_factor, int64_t b_rows, int64_t n, float* out, int64_t stride) {
  const int64_t all = ceil_div(n, 2);
  for (int64_t number = 0; number * kPanel < b_rows; ++number) {
    const Panel panel(b, number, b_rows, all);
    for (int64_t k = 0; k < all; k += kChain)
      for (int64_t i = 0; i < a_rows; i += kRows)
        rows_of_panel<1>({a + i * all + k, all, 1, 0}, at_most(kRows, a_rows - i), panel, k,
                         at_most(kChain, all - k), out + i * stride, stride, k > 0);
    for (int64_t v = 0; v < panel.vectors; ++v) {
      const int64_t first = panel.first + v * kLanes;
      const __mmask16 mask = first_lanes(b_rows - first);
      const __m512 factor = _mm512_maskz_loadu_ps(mask, b_factor + first);
      for (int64_t i = 0; i < a_rows; ++i) {
        float* to = out + i * stride + first;
        const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, to), _mm512_set1_ps(a_factor[i]));
        _mm512_mask_storeu_ps(to, mask, _mm512_mul_ps(scaled, factor));
      }
    }
  }
}

// 32 numbers in two parts of bfloat16, neighbours in one pair.
struct Parts {
  __m512i high, low;
};
__m512 wide(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
Parts parts_of(__m512 first, __m512 second) {
  const __m512i high = as_bits(_mm512_cvtne2ps_pbh(second, first));
  const __m512 rest_of_first = _mm512_sub_ps(first, wide(_mm512_castsi512_si256(high))),
               rest_of_second = _mm512_sub_ps(second, wide(_mm512_extracti64x4_epi64(high, 1)));
  return {high, as_bits(_mm512_cvtne2ps_pbh(rest_of_second, rest_of_first))};
}

// Pair k of a row joins its sum again by the lower parts.
void add_low(const uint32_t* low, int64_t k, const uint32_t* b, int64_t all_pairs, int64_t n, float* out) {
  for (int64_t number = 0; number * kPanel < n; ++number)
    rows_of_panel<1>({low, 0, 1, 0}, 1, Panel(b, number, n, all_pairs), k, 1, out, n, true);
}

void add_weighted_rows(const float* e, int64_t stride, const float* factor, const float* limit, int64_t rows,
                       int64_t columns, const uint32_t* b, int64_t n, float* out) {
  alignas(64) uint32_t pairs[2][kRows][kChain];
  uint32_t beyond[kRows][kChain / kLanes];  // a bit for each number of those pairs
  const int64_t all = ceil_div(columns, 2);
  for (int64_t k = 0; k < all; k += kChain) {
    const int64_t count = at_most(kChain, all - k);
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t held = at_most(kRows, rows - i);
      for (int64_t q = 0; q < count; q += kLanes) {
        const int64_t first = 2 * (k + q);
        const __mmask16 mask0 = first_lanes(columns - first), mask1 = first_lanes(columns - first - kLanes);
        const __m512 factor0 = _mm512_maskz_loadu_ps(mask0, factor + first),
                     factor1 = _mm512_maskz_loadu_ps(mask1, factor + first + kLanes);
        for (int64_t r = 0; r < held; ++r) {
          const float* row = e + (i + r) * stride + first;
          const __m512 value0 = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask0, row), factor0),
                       value1 = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask1, row + kLanes), factor1);
          const Parts of = parts_of(value0, value1);
          _mm512_store_si512(&pairs[0][r][q], of.high);
          _mm512_store_si512(&pairs[1][r][q], of.low);
          if (limit == nullptr) continue;
          const __m512 most = _mm512_set1_ps(limit[i + r]);
          beyond[r][q / kLanes] = _mm512_cmp_ps_mask(_mm512_abs_ps(value0), most, _CMP_GT_OQ) |
                                  uint32_t(_mm512_cmp_ps_mask(_mm512_abs_ps(value1), most, _CMP_GT_OQ)) << 16;
        }
      }
      const Factor a{&pairs[0][0][0], kChain, 1, kRows * kChain};
      for (int64_t number = 0; number * kPanel < n; ++number) {
        const Panel panel(b, number, n, all);
        if (limit == nullptr)
          rows_of_panel<2>(a, held, panel, k, count, out + i * n, n, true);
        else
          rows_of_panel<1>(a, held, panel, k, count, out + i * n, n, true);
      }
      for (int64_t r = 0; limit != nullptr && r < held; ++r)
        for (int64_t q = 0; q < count; q += kLanes)
          for (uint32_t left = beyond[r][q / kLanes]; left != 0;) {
            const int pair = __builtin_ctz(left) / 2;
            left &= ~(uint32_t(3) << (2 * pair));
            add_low(&pairs[1][r][q + pair], k + q + pair, b, all, n, out + (i + r) * n);
          }
    }
  }
}

void weighted_sums(const float* e, int64_t stride, const float* factor, int64_t rows, int64_t columns,
                   const uint32_t* b, int64_t n, float* out) {
  alignas(64) uint32_t pairs[2][kChain][kLanes];
  // Where numbers of two rows are neighbours.
  const int64_t all = ceil_div(rows, 2);
  for (int64_t k = 0; k < all; k += kChain) {
    const int64_t count = at_most(kChain, all - k);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const __mmask16 mask = first_lanes(columns - j);
      for (int64_t q = 0; q < count; ++q) {
        const int64_t i = 2 * (k + q);
        const auto weighted = [&](int64_t row) {
          return row < rows ? _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, e + row * stride + j),
                                            _mm512_set1_ps(factor[row]))
                            : _mm512_setzero_ps();
        };
        const Parts of = parts_of(weighted(i), weighted(i + 1));
        _mm512_store_si512(&pairs[0][q][0], _mm512_permutexvar_epi16(kHalves.load(), of.high));
        _mm512_store_si512(&pairs[1][q][0], _mm512_permutexvar_epi16(kHalves.load(), of.low));
      }
      for (int64_t r = 0; r < kLanes && j + r < columns; r += kRows)
        for (int64_t number = 0; number * kPanel < n; ++number)
          rows_of_panel<2>({&pairs[0][0][r], 1, kLanes, kChain * kLanes}, at_most(kRows, columns - j - r),
                           Panel(b, number, n, all), k, count, out + (j + r) * n, n, k > 0);
    }
  }
}

}  // namespace
}  // namespace nf::cpu::avx512bf16

#include "cpu/pairs_pack.inc"

namespace nf::cpu::avx512bf16 {

const PairKernels* make_pair_kernels() {
  static const PairKernels kernels = {room_of_rows, room_across,       room_down,
                                      pack_rows,    pack_across,       pack_down,
                                      rows_by_rows, add_weighted_rows, weighted_sums};
  return &kernels;
}

}  // namespace nf::cpu::avx512bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else

namespace nf::cpu::avx512bf16 {
const PairKernels* make_pair_kernels() { return nullptr; }
}  // namespace nf::cpu::avx512bf16
#endif
