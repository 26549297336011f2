// O = f(Q K^T) V on tensor cores, a tile of the first product at a time: what both kernels of
// sm80_single_sweep.cu are made of.
//
// A block owns kTile rows of Q and of O; a warp takes whole rows, so that what it makes of the scores is, as
// it lies in its registers, the left factor of the second product.
#pragma once

#include <device/shared_memory.cuh>

#include "cuda/device/mma_tile.cuh"
#include "cuda/products/sm80_single_sweep.h"

namespace nf {
namespace {

constexpr int kTile = tiles::Sm80SingleSweep<256>::kTile;

template <int kColumns>
struct Shape : tiles::Sm80SingleSweep<kColumns> {
  using Base = tiles::Sm80SingleSweep<kColumns>;
  static constexpr int kThreads = Base::kWarps * kWarp;
  using Tile = HeldTile<float, Base::kWarps, 1, 2 * Base::kRowSteps, kColumns / 8>;
  static_assert(Tile::kScratch * sizeof(float) <= Base::kFactors * sizeof(Half));
  static_assert(sizeof(SweepRow) == 16);  // as Base::shared() has it
};

// Shared memory of a block: Q, the stages of K and of V, and what is known of the rows with an offset.
template <class S, int kColumns>
struct Buffers {
  Half* q;
  Half* keys;
  BFloat16* values;
  SweepRow* rows;

  NF_DEVICE explicit Buffers(SharedMemory& shared)
      : q(shared.take<Half>(S::kFactors)),
        keys(q + kTile * kColumns),
        values(reinterpret_cast<BFloat16*>(keys) + S::kStages * S::kPart),
        rows(shared.take<SweepRow>(S::kRows)) {}
};

// O over the keys [begin, end) in steps of kKeys. `fetch(key, stage)` starts the copies of a stage;
// `weigh(key, stage, scores)` turns scores[m][n][…] of 16 rows x 8 keys each into E.
template <class S, int kColumns, class Fetch, class Weigh>
NF_DEVICE void sweep(const Buffers<S, kColumns>& buffers, int begin, int end, const Fetch& fetch,
                     const Weigh& weigh, float (&out)[S::kRowSteps][kColumns / 8][4]) {
  const auto fetch_or_nothing = [&](int key, int stage) {
    if (key < end) fetch(key, stage);
    copy_async_commit();  // also when empty: a wait counts groups
  };
  for (int stage = 0; stage < S::kStages - 1; ++stage) fetch_or_nothing(begin + stage * S::kKeys, stage);
  const int matrix = lane_id() / 8, i = lane_id() % 8;  // which of the four an ldmatrix reads, its row
  // All three factors are read in the same pattern: rows matrix % 2 * 8 + i, chunk matrix / 2 of two.
  const int row = (matrix % 2 * 8 + i) * kColumns, chunk = swizzled(matrix / 2 * kChunk, i);
  const Half* q_rows = buffers.q + warp_id() * S::kRowSteps * 16 * kColumns + row;
  int stage = 0;
  for (int key = begin; key < end; key += S::kKeys) {
    copy_async_wait<S::kStages - 2>();
    sync_block();  // this step's copies, made by all threads, before its reads; and the last step's reads
                   // before the fetch below overwrites their stage
    fetch_or_nothing(key + (S::kStages - 1) * S::kKeys, (stage + S::kStages - 1) % S::kStages);
    const Half* k_rows = buffers.keys + stage * S::kPart + row;
    float scores[S::kRowSteps][S::kKeys / 8][4] = {};
#pragma unroll 8  // all sixteen of 256 columns would have more loads under way than registers
    for (int d = 0; d < kColumns; d += 16) {
      uint32_t a[S::kRowSteps][4];
#pragma unroll
      for (int m = 0; m < S::kRowSteps; ++m) load_matrix_x4(a[m], q_rows + m * 16 * kColumns + (chunk ^ d));
#pragma unroll
      for (int n = 0; n < S::kKeys / 8; n += 2) {
        uint32_t b[4];
        load_matrix_x4(b, k_rows + n * 8 * kColumns + (chunk ^ d));
        const uint32_t low[2] = {b[0], b[2]}, high[2] = {b[1], b[3]};
#pragma unroll
        for (int m = 0; m < S::kRowSteps; ++m) {
          mma_f16(scores[m][n], a[m], low);
          mma_f16(scores[m][n + 1], a[m], high);
        }
      }
    }
    weigh(key, stage, scores);
    const BFloat16* v_rows = buffers.values + stage * S::kPart + row;
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; n += 2) {
      uint32_t e[S::kRowSteps][4];  // 16 rows x 16 keys: the fragment of a product's left factor
#pragma unroll
      for (int m = 0; m < S::kRowSteps; ++m)
#pragma unroll
        for (int part = 0; part < 4; ++part)
          e[m][part] =
              pack_bf16(scores[m][n + part / 2][part % 2 * 2], scores[m][n + part / 2][part % 2 * 2 + 1]);
#pragma unroll
      for (int d = 0; d < kColumns / 8; d += 2) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, v_rows + n * 8 * kColumns + (chunk ^ (d * kChunk)));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < S::kRowSteps; ++m) {
          mma_bf16(out[m][d], e[m], low);
          mma_bf16(out[m][d + 1], e[m], high);
        }
      }
    }
    stage = (stage + 1) % S::kStages;
  }
  copy_async_wait<0>();  // no copy may be under way when the block ends or uses its place
}

}  // namespace
}  // namespace nf
