// Tiles in shared memory, as the kernels of products use them; of 16-bit values unless said otherwise.
//
// A row takes a multiple of 64 values: 128 bytes, all 32 banks. An ldmatrix reads 16 bytes of eight rows
// at once; were a row stored as it is, all eight would lie in the same four banks. So the 16-byte chunks
// of a row are exchanged among themselves by an XOR with a key that differs between those eight rows.
#pragma once

#include <device/copy_async.cuh>
#include <device/tensor_core.cuh>

#include "cuda/device/stored.cuh"
#include "engine/tiles.h"

namespace nf {
namespace {

constexpr int kChunk = 8;  // values of a 16-byte access
using tiles::kBlock;

NF_HD int padded_columns(int64_t columns) { return int(tiles::padded_columns(columns)); }

// Where the chunk at `column` of a row lies, a multiple of the chunk's length; wider types have fewer values
// in a chunk.
template <class T = Half>
NF_DEVICE int swizzled(int column, int key) {
  return column ^ (key * kVectorOf<T>);
}

// Keys of a row: for eight rows in sequence, and for the eight that `dealt_row` puts side by side.
struct KeyNone {  // of rows that are not read eight at a time
  NF_DEVICE int operator()(int) const { return 0; }
};
struct KeyInOrder {
  NF_DEVICE int operator()(int row) const { return row % 8; }
};
struct KeyDealt {
  NF_DEVICE int operator()(int row) const { return row / 8 % 4 * 2 + row % 2; }
};

// A product's fragment gives a lane two neighbouring columns of every eight. For it to end up with eight
// neighbours instead, which leave in one access of 16 bytes, 32 rows of b are dealt out to the columns of
// four steps: column i of step j is row dealt_row(j, i), and lane % 4 = t holds rows 8t … 8t + 7 in order.
NF_DEVICE int dealt_row(int step, int i) { return i / 2 * 8 + step * 2 + i % 2; }

// Fetches kRows rows x kColumns columns of from[rows, columns] (row length `stride`), zeros beyond either.
template <int kRows, int kColumns, int kThreads, class Key, class T>
NF_DEVICE void fetch_block(const T* __restrict__ from, int64_t first_row, int64_t rows, int64_t first_column,
                           int64_t columns, int64_t stride, T* tile, int tile_stride, const Key& key) {
  constexpr int kChunks = kColumns / kVectorOf<T>;
  constexpr int kRounds = (kRows * kChunks + kThreads - 1) / kThreads;
#pragma unroll 2
  for (int round = 0; round < kRounds; ++round) {
    const int k = round * kThreads + thread_id();
    const int row = k / kChunks, column = k % kChunks * kVectorOf<T>;
    if (kRows * kChunks % kThreads != 0 && row >= kRows) break;
    const bool valid = first_row + row < rows && first_column + column < columns;
    copy_async_16(tile + row * tile_stride + swizzled<T>(column, key(row)),
                  from + (valid ? (first_row + row) * stride + first_column + column : 0), valid);
  }
}

// Two values as a register of a fragment has them, the first in the lower half.
NF_DEVICE uint32_t pack_bf16(float low, float high) {
  const Vector<BFloat16, 2> pair{{BFloat16(low), BFloat16(high)}};
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

}  // namespace
}  // namespace nf
