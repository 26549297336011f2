// The kernels of inner_distance.cu.
#pragma once

#include "cuda/device/per_row.cuh"
#include "cuda/device/row_scale.cuh"
#include "math/distance.h"

namespace nf {
namespace {

constexpr int kTile = 64;                           // results per block: kTile x kTile
constexpr int kSide = 16;                           // threads per side of it: kSide * kSide = kThreads
constexpr int kOwn = kTile / kSide;                 // results per thread and side
constexpr int kDepth = 16;                          // of the third axis, per step
constexpr int64_t kCellsAtOnce = int64_t(1) << 26;  // wide scratch of a 16-bit result

// sum[r] = sum of x[r]^2 (squared) or of x[r]. One warp per row.
template <class T>
NF_KERNEL(kThreads)
row_sums_kernel(StoredArray x, int64_t rows, int64_t length, bool squared, T* __restrict__ sum) {
  const int64_t r = block_id() * kRowsPerBlock + warp_id();
  if (r >= rows) return;  // the whole warp leaves
  T total = 0;
  for (int64_t d = lane_id(); d < length; d += kWarp) {
    const T v = x.load<T>(r * length + d);
    total += squared ? v * v : v;
  }
  total = warp_sum(total);
  if (lane_id() == 0) sum[r] = total;
}

// sum[j] = sum over i of g[i, j]. One thread per column: neighbours read neighbours.
template <class T>
NF_KERNEL(kThreads)
column_sums_kernel(StoredArray g, int64_t rows, int64_t columns, T* __restrict__ sum) {
  const int64_t j = block_id() * kThreads + thread_id();
  if (j >= columns) return;
  T total = 0;
  for (int64_t i = 0; i < rows; ++i) total += g.load<T>(i * columns + j);
  sum[j] = total;
}

// Fetches columns [k0, k0 + kDepth) of kTile rows of `from` [rows, depth] into tile [kDepth, kTile], zeros beyond.
template <class T>
NF_DEVICE void fetch_tile(const StoredArray& from, int64_t first, int64_t rows, int64_t k0, int64_t depth,
                          T* tile) {
#pragma unroll 1  // unrolled, the staging copies cost predicates that spill
  for (int e = thread_id(); e < kTile * kDepth; e += kThreads) {
    const int r = e / kDepth, k = e % kDepth;
    const bool inside = k0 + k < depth && first + r < rows;
    tile[k * kTile + r] = inside ? from.load<T>((first + r) * depth + k0 + k) : T(0);
  }
}

// Near cells of a tile up to which each is summed by a warp; where there are more, the whole tile is: a warp has to
// read two rows for its one cell, a tile 128 for 4096.
constexpr int kFewCells = 128;

template <class T>
struct FinishSquared {
  const T* products;  // [N, stride], `width` of them valid
  int64_t stride;
  StoredArray x, w;  // [N, D], [C, D]
  const T *xx, *ww;  // [N], [C]
  int64_t batch, dim, classes, first, width;
  StoredArray out;       // [N, C], perhaps where the products are
  unsigned* near_cells;  // [N, words] or null: which cells those were, a bit each
};

// products <x, w> -> squared distances; those too near are computed again from the differences. Blocks: tiles of
// rows x tiles of the chunk's columns, whose first is a multiple of a word's cells.
template <class T>
NF_KERNEL(kThreads)
finish_squared_kernel(FinishSquared<T> task) {
  SharedMemory shared;
  T* left = shared.take<T>(kDepth * kTile);   // [kDepth, kTile]
  T* right = shared.take<T>(kDepth * kTile);  // [kDepth, kTile]
  int* scratch = shared.take<int>(kThreads / kWarp);
  const int64_t tiles = (task.width + kTile - 1) / kTile;
  const int64_t i0 = block_id() / tiles * kTile, j0 = block_id() % tiles * kTile;
  const int row = thread_id() / kSide, column = thread_id() % kSide;
  unsigned near_here = 0;  // of this thread's cells; the others are finished
#pragma unroll 1           // few registers are left while the differences are summed
  for (int own = 0; own < kOwn * kOwn; ++own) {
    const int64_t i = i0 + own / kOwn * kSide + row, j = j0 + own % kOwn * kSide + column;
    if (i >= task.batch || j >= task.width) continue;
    const T xx = task.xx[i], ww = task.ww[task.first + j];
    const T d = math::distance_from_products(xx, ww, task.products[i * task.stride + j]);
    if (math::distance_needs_differences(d, xx, ww))
      near_here |= 1u << own;
    else
      task.out.template store<T>(i * task.classes + task.first + j, d);
  }
  if (task.near_cells != nullptr) {
    // A warp has two rows of 16 neighbouring columns; two of its ballots make a word of each row.
    const int64_t words = (task.classes + kWarp - 1) / kWarp;
#pragma unroll
    for (int m = 0; m < kOwn; ++m)
#pragma unroll
      for (int n = 0; n < kOwn; n += 2) {
        const unsigned low = warp_ballot(near_here >> (m * kOwn + n) & 1u),
                       high = warp_ballot(near_here >> (m * kOwn + n + 1) & 1u);
        const unsigned word = row % 2 == 0 ? (low & 0xffffu) | high << 16 : low >> 16 | (high & 0xffff0000u);
        const int64_t i = i0 + m * kSide + row, j = j0 + n * kSide;
        if (column == 0 && i < task.batch && j < task.width)
          task.near_cells[i * words + (task.first + j) / kWarp] = word;
      }
  }
  const int found = block_sum(count_bits(near_here), scratch);
  if (found > kFewCells) {
    T sum[kOwn][kOwn] = {};
    for (int64_t k0 = 0; k0 < task.dim; k0 += kDepth) {
      sync_block();  // the reads below of the step before, before these writes
      fetch_tile(task.x, i0, task.batch, k0, task.dim, left);
      fetch_tile(task.w, task.first + j0, task.first + task.width, k0, task.dim, right);
      sync_block();             // the writes above, before the reads below
      T part[kOwn][kOwn] = {};  // of this step: a sum one by one over all columns would drift
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k)
#pragma unroll
        for (int m = 0; m < kOwn; ++m)
#pragma unroll
          for (int n = 0; n < kOwn; ++n)
            part[m][n] += math::distance_term<T>(
                              2, left[k * kTile + m * kSide + row] - right[k * kTile + n * kSide + column])
                              .value;
#pragma unroll
      for (int m = 0; m < kOwn; ++m)
#pragma unroll
        for (int n = 0; n < kOwn; ++n) sum[m][n] += part[m][n];
    }
#pragma unroll
    for (int m = 0; m < kOwn; ++m)
#pragma unroll
      for (int n = 0; n < kOwn; ++n)
        if (near_here >> (m * kOwn + n) & 1u)
          task.out.template store<T>(
              (i0 + m * kSide + row) * task.classes + task.first + j0 + n * kSide + column, sum[m][n]);
  } else if (found > 0) {
#pragma unroll 1
    for (int own = 0; own < kOwn * kOwn; ++own)
#pragma unroll 1
      for (unsigned all = warp_ballot(near_here >> own & 1u); all != 0; all &= all - 1) {
        const int lane = lowest_bit(all);
        const int64_t i = i0 + own / kOwn * kSide + warp_id() * 2 + lane / kSide,
                      j = task.first + j0 + own % kOwn * kSide + lane % kSide;
        T sum = 0;
#pragma unroll 1
        for (int64_t k = lane_id(); k < task.dim; k += kWarp)
          sum += math::distance_term<T>(
                     2, task.x.template load<T>(i * task.dim + k) - task.w.template load<T>(j * task.dim + k))
                     .value;
        sum = warp_sum(sum);
        if (lane_id() == 0) task.out.template store<T>(i * task.classes + j, sum);
      }
  }
}

// out[m, n] = sum over k of |a[m, k] - b[n, k]|. Blocks: tiles of m x tiles of n.
template <class T>
NF_KERNEL(kThreads)
manhattan_kernel(StoredArray a, StoredArray b, int64_t rows, int64_t columns, int64_t depth,
                 StoredArray out) {
  SharedMemory shared;
  T* left = shared.take<T>(kDepth * kTile);   // [kDepth, kTile]
  T* right = shared.take<T>(kDepth * kTile);  // [kDepth, kTile]
  const int64_t tiles = (columns + kTile - 1) / kTile;
  const int64_t m0 = block_id() / tiles * kTile, n0 = block_id() % tiles * kTile;
  const int row = thread_id() / kSide, column = thread_id() % kSide;
  T sum[kOwn][kOwn] = {};
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    sync_block();  // the reads below of the step before, before these writes
    fetch_tile(a, m0, rows, k0, depth, left);
    fetch_tile(b, n0, columns, k0, depth, right);
    sync_block();  // the writes above, before the reads below
    for (int k = 0; k < kDepth; ++k)
      for (int m = 0; m < kOwn; ++m)
        for (int n = 0; n < kOwn; ++n)
          sum[m][n] += math::distance_term<T>(
                           1, left[k * kTile + m * kSide + row] - right[k * kTile + n * kSide + column])
                           .value;
  }
  for (int m = 0; m < kOwn; ++m)
    for (int n = 0; n < kOwn; ++n) {
      const int64_t i = m0 + m * kSide + row, j = n0 + n * kSide + column;
      if (i < rows && j < columns) out.store<T>(i * columns + j, sum[m][n]);
    }
}

// Whether cell (i, j) of `columns` is near: rows of whole words, a bit per cell.
NF_DEVICE bool is_near(const unsigned* near_cells, int64_t columns, int64_t i, int64_t j) {
  return (near_cells[i * ((columns + kWarp - 1) / kWarp) + j / kWarp] >> (j % kWarp) & 1u) != 0;
}

// far[i, j] = g[i, j], and 0 in the cells that are near; marks[tile] tells whether a tile of kTile x kTile
// has one of those. Blocks: tiles of rows x tiles of columns.
template <class T>
NF_KERNEL(kThreads)
far_cells_kernel(StoredArray g, const unsigned* __restrict__ near_cells, int64_t rows, int64_t columns,
                 StoredArray far, int* __restrict__ marks) {
  SharedMemory shared;
  int* scratch = shared.take<int>(kThreads / kWarp);
  const int64_t tiles = (columns + kTile - 1) / kTile;
  const int64_t i0 = block_id() / tiles * kTile, j0 = block_id() % tiles * kTile;
  int found = 0;
  for (int e = thread_id(); e < kTile * kTile; e += kThreads) {
    const int64_t i = i0 + e / kTile, j = j0 + e % kTile, at = i * columns + j;
    if (i >= rows || j >= columns) continue;
    const bool near_cell = is_near(near_cells, columns, i, j);
    found = near_cell ? 1 : found;
    far.store<T>(at, near_cell ? T(0) : g.load<T>(at));
  }
  found = block_largest(found, scratch);
  if (thread_id() == 0) marks[block_id()] = found != 0;
}

// The upstream gradient of rows m against rows k: cell (m, k) of g, or (k, m) where it lies transposed.
struct Cells {
  StoredArray g;    // [N, columns]
  int64_t columns;  // C
  bool transposed;
  const unsigned* near_cells;  // [N, words]; kOrder 2 alone
  const int* marks;            // [tiles of N, tiles of C]; likewise

  NF_DEVICE bool tile_is_empty(int64_t m_tile, int64_t k_tile) const {
    const int64_t tiles = (columns + kTile - 1) / kTile;
    return marks[transposed ? k_tile * tiles + m_tile : m_tile * tiles + k_tile] == 0;
  }
  template <class T, int kOrder>
  NF_DEVICE T load(int64_t m, int64_t k) const {
    const int64_t i = transposed ? k : m, j = transposed ? m : k;
    return kOrder == 1 || is_near(near_cells, columns, i, j) ? g.load<T>(i * columns + j) : T(0);
  }
};

// sum[m, d] = sum over k of g(m, k) slope(a[m, d] - b[k, d]) over all cells (kOrder 1), or over those that
// are near (kOrder 2); for those, out = 2 (total[m] a[m, d] - product[m, d]) + sum, the gradient of the
// squared distance. Blocks: tiles of m x tiles of d.
template <class T, int kOrder>
NF_KERNEL(kThreads)
slopes_kernel(StoredArray a, StoredArray b, Cells cells, int64_t rows, int64_t others, int64_t dim,
              const T* __restrict__ total, const T* product,
              StoredArray out)  // perhaps where the product is
{
  SharedMemory shared;
  T* weights = shared.take<T>(kDepth * kTile);  // [kDepth, kTile] of g
  T* other = shared.take<T>(kDepth * kTile);    // [kDepth, kTile] of b
  const int64_t tiles = (dim + kTile - 1) / kTile;
  const int64_t m0 = block_id() / tiles * kTile, d0 = block_id() % tiles * kTile;
  const int row = thread_id() / kSide, column = thread_id() % kSide;
  T own[kOwn][kOwn], sum[kOwn][kOwn] = {};
  for (int m = 0; m < kOwn; ++m)
    for (int d = 0; d < kOwn; ++d) {
      const int64_t i = m0 + m * kSide + row, at = d0 + d * kSide + column;
      own[m][d] = i < rows && at < dim ? a.load<T>(i * dim + at) : T(0);
    }
  for (int64_t k0 = 0; k0 < others; k0 += kDepth) {
    if (kOrder == 2 && cells.tile_is_empty(m0 / kTile, k0 / kTile)) continue;  // the whole block
    sync_block();  // the reads below of the step before, before these writes
#pragma unroll 1   // unrolled, the staging copies cost predicates that spill
    for (int e = thread_id(); e < kTile * kDepth; e += kThreads) {
      const int k = e / kTile, r = e % kTile;
      const bool inside = k0 + k < others;
      weights[k * kTile + r] = inside && m0 + r < rows ? cells.load<T, kOrder>(m0 + r, k0 + k) : T(0);
      other[k * kTile + r] = inside && d0 + r < dim ? b.load<T>((k0 + k) * dim + d0 + r) : T(0);
    }
    sync_block();  // the writes above, before the reads below
    for (int k = 0; k < kDepth; ++k)
      for (int m = 0; m < kOwn; ++m)
        for (int d = 0; d < kOwn; ++d)
          sum[m][d] +=
              weights[k * kTile + m * kSide + row] *
              math::distance_term<T>(kOrder, own[m][d] - other[k * kTile + d * kSide + column]).slope;
  }
  for (int m = 0; m < kOwn; ++m)
    for (int d = 0; d < kOwn; ++d) {
      const int64_t i = m0 + m * kSide + row, at = d0 + d * kSide + column;
      if (i >= rows || at >= dim) continue;
      const T far = kOrder == 2 ? T(2) * (total[i] * own[m][d] - product[i * dim + at]) : T(0);
      out.store<T>(i * dim + at, far + sum[m][d]);
    }
}

}  // namespace
}  // namespace nf
