// A block's tile of scores for sm80_scores.cu: how its warps share it, the product, and sums along its rows.
#pragma once

#include <device/shared_memory.cuh>
#include <device/warp.cuh>

#include "cuda/device/mma_tile.cuh"
#include "engine/tiles.h"

namespace nf {
namespace {

constexpr int kTile = tiles::Sm80Scores::kTile, kStages = tiles::Sm80Scores::kStages;

// Warps, four along the rows and kAcross along the classes: 32 x 64 of the tile each, as two row steps of 16
// and two groups of 32 dealt classes.
constexpr int kWarpRows = 32, kWarpColumns = tiles::Sm80Scores::kWarpColumns;
constexpr int kRowSteps = kWarpRows / 16, kGroups = kWarpColumns / 32;
constexpr int kHeldRows = 2 * kRowSteps;  // rows a lane has a part of

template <int kAcross_>
struct Shape {
  static constexpr int kAcross = kAcross_;
  static constexpr int kThreads = 4 * kAcross * kWarp;
  static constexpr int kClasses = kAcross * kWarpColumns;
};

// What a lane holds of the tile's result: for held row r and group g, classes column() + 32 g + {0 … 7}.
template <class S>
NF_DEVICE int held_row(int r) {
  return warp_id() / S::kAcross * kWarpRows + r / 2 * 16 + r % 2 * 8 + lane_id() / 4;
}
template <class S>
NF_DEVICE int held_column() {
  return warp_id() % S::kAcross * kWarpColumns + lane_id() % 4 * kChunk;
}

// acc += x[:, depth] w^T for this warp's part of the tile, over kBlock columns.
template <class S>
NF_DEVICE void multiply_stage(const Half* x, int x_stride, const Half* w,
                              float (&acc)[kRowSteps][kGroups][4][4]) {
  const int matrix = lane_id() / 8, i = lane_id() % 8;  // which of the four an ldmatrix reads, its row
  const Half* x_rows = x + (warp_id() / S::kAcross * kWarpRows + matrix % 2 * 8 + i) * x_stride;
  const Half* w_rows = w + (warp_id() % S::kAcross * kWarpColumns + dealt_row(matrix / 2, i)) * kBlock;
  const int x_chunk = swizzled(matrix / 2 * kChunk, i), w_chunk = swizzled(matrix % 2 * kChunk, i);
#pragma unroll
  for (int k = 0; k < kBlock; k += 16) {
    uint32_t a[kRowSteps][4];
#pragma unroll
    for (int m = 0; m < kRowSteps; ++m) load_matrix_x4(a[m], x_rows + m * 16 * x_stride + (x_chunk ^ k));
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int j = 0; j < 4; j += 2) {  // two steps of eight dealt classes at once
        uint32_t b[4];
        load_matrix_x4(b, w_rows + (n * 32 + dealt_row(j, 0)) * kBlock + (w_chunk ^ k));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < kRowSteps; ++m) {
          mma_f16(acc[m][n][j], a[m], low);
          mma_f16(acc[m][n][j + 1], a[m], high);
        }
      }
  }
}

}  // namespace
}  // namespace nf
