// E = exp(s x_hat w_hat^T - kappa) on tensor cores (mma.sync, compute capability 8.0).
//
// A block owns kTile rows of x_hat, which stay in shared memory, and walks over some tiles of kTile
// classes. w_hat streams through kStages buffers of kDepth columns, fetched by asynchronous copies that
// run ahead across tile borders, so that the exponentials of one tile overlap the loads of the next. A
// finished tile is turned into E in registers, summed there, and leaves through a staging buffer in
// accesses of 16 bytes. Rows and classes beyond the edge are zero, and left out of sums and stores.
//
// Rows of shared memory are padded by 16 bytes: the eight rows an ldmatrix reads then lie in eight
// different groups of banks.
#include <device/copy_async.cuh>
#include <device/shared_memory.cuh>
#include <device/tensor_core.cuh>
#include <device/vector.cuh>

#include "math/softmax.h"
#include "reduce.cuh"
#include "score_exp.h"

namespace nf {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;  // rows, and classes, of a tile
constexpr int kDepth = 32;  // columns of w_hat per stage: two mma steps
constexpr int kStages = 4;
constexpr int kPad = 8;    // 16-bit values: 16 bytes
constexpr int kChunk = 8;  // 16-bit values per copy
constexpr int kStageRow = kDepth + kPad;
constexpr int kStagingRow = kTile + kPad;

// Eight warps, two along the rows and four along the classes: 64 x 32 of the tile each.
constexpr int kWarpsAcross = 4;
constexpr int kWarpRows = 64, kWarpColumns = 32;
constexpr int kRowSteps = kWarpRows / 16, kColumnSteps = kWarpColumns / 8;

NF_HD int depth_steps(int64_t dim) { return int((dim + kDepth - 1) / kDepth); }
NF_HD int x_row(int64_t dim) { return depth_steps(dim) * kDepth + kPad; }
NF_HD int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }

// What a lane holds of the tile's result: rows row + {0, 8} of each row step, columns column + {0, 1} of
// each column step.
struct Fragment {
  int row;
  int column;

  NF_DEVICE Fragment()
      : row(warp_id() / kWarpsAcross * kWarpRows + lane_id() / 4),
        column(warp_id() % kWarpsAcross * kWarpColumns + lane_id() % 4 * 2) {}
};

NF_DEVICE void load_x(const Half* __restrict__ x_hat, int64_t first_row, int64_t batch, int64_t dim,
                      Half* x) {
  const int chunks = depth_steps(dim) * kDepth / kChunk;
  for (int k = thread_id(); k < kTile * chunks; k += kThreads) {
    const int row = k / chunks, column = k % chunks * kChunk;
    const bool valid = first_row + row < batch && column < dim;
    copy_async_16(x + row * x_row(dim) + column, x_hat + (valid ? (first_row + row) * dim + column : 0),
                  valid);
  }
}

// Columns [depth * kDepth, + kDepth) of the classes [first, first + kTile).
NF_DEVICE void load_w(const Half* __restrict__ w_hat, int64_t first, int64_t width, int64_t dim, int depth,
                      Half* w) {
  constexpr int kChunks = kDepth / kChunk;
  for (int k = thread_id(); k < kTile * kChunks; k += kThreads) {
    const int row = k / kChunks, within = k % kChunks * kChunk;
    const int64_t column = depth * kDepth + within;
    const bool valid = first + row < width && column < dim;
    copy_async_16(w + row * kStageRow + within, w_hat + (valid ? (first + row) * dim + column : 0), valid);
  }
}

// acc += x[:, depth] w[:, depth]^T for this warp's part of the tile.
NF_DEVICE void multiply_stage(const Half* x, int x_stride, int depth, const Half* w,
                              float (&acc)[kRowSteps][kColumnSteps][4]) {
  const int matrix = lane_id() / 8, row_in_matrix = lane_id() % 8;
  const Half* x_rows = x +
                       (warp_id() / kWarpsAcross * kWarpRows + (matrix & 1) * 8 + row_in_matrix) * x_stride +
                       depth * kDepth + (matrix >> 1) * 8;
  const Half* w_rows =
      w + (warp_id() % kWarpsAcross * kWarpColumns + (matrix >> 1) * 8 + row_in_matrix) * kStageRow +
      (matrix & 1) * 8;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[kRowSteps][4], b[kColumnSteps / 2][4];
#pragma unroll
    for (int m = 0; m < kRowSteps; ++m) load_matrix_x4(a[m], x_rows + m * 16 * x_stride + k);
#pragma unroll
    for (int n = 0; n < kColumnSteps / 2; ++n) load_matrix_x4(b[n], w_rows + n * 16 * kStageRow + k);
#pragma unroll
    for (int m = 0; m < kRowSteps; ++m)
#pragma unroll
      for (int n = 0; n < kColumnSteps; ++n) {
        const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
        mma_f16(acc[m][n], a[m], pair);
      }
  }
}

// The staged tile to its place in E, 16 bytes per access.
NF_DEVICE void store_tile(const ScoreExp& task, int64_t first_row, int64_t tile_first,
                          const BFloat16* staging) {
  constexpr int kChunks = kTile / kChunk;
  for (int k = thread_id(); k < kTile * kChunks; k += kThreads) {
    const int row = k / kChunks, column = k % kChunks * kChunk;
    const int64_t i = first_row + row, j = tile_first + column;
    // Rows of E are padded to a multiple of kChunk, so a chunk that begins inside fits.
    if (i < task.batch && j < task.width)
      store_vector<kChunk>(task.e + i * task.stride + j,
                           load_vector<kChunk>(staging + row * kStagingRow + column));
  }
}

// Sums (or the maximum) of a row over the lanes and warps that share it, in a fixed order; scratch is
// [kWarpsAcross, kTile]. `combine` of two values, `put(row, value)` once per row of the block.
template <class Combine, class Put>
NF_DEVICE void over_row(float (&mine)[2 * kRowSteps], float* scratch, const Combine& combine,
                        const Put& put) {
  const Fragment at;
#pragma unroll
  for (int r = 0; r < 2 * kRowSteps; ++r) {
    mine[r] = combine(mine[r], shuffle_xor(mine[r], 1));
    mine[r] = combine(mine[r], shuffle_xor(mine[r], 2));
  }
  sync_block();  // an earlier call's reads of scratch, before these writes
  if (lane_id() % 4 == 0)
    for (int r = 0; r < 2 * kRowSteps; ++r)
      scratch[warp_id() % kWarpsAcross * kTile + at.row + r / 2 * 16 + r % 2 * 8] = mine[r];
  sync_block();  // the writes above, before the reads below
  if (thread_id() < kTile) {
    float value = scratch[thread_id()];
    for (int w = 1; w < kWarpsAcross; ++w) value = combine(value, scratch[w * kTile + thread_id()]);
    put(thread_id(), value);
  }
}

// kLargestOnly: the first of two passes, for scales outside the fixed shift's window.
template <bool kLargestOnly>
NF_KERNEL(kThreads)
score_exp_kernel(ScoreExp task, int64_t tiles_per_block) {
  const double s = task.scale.value();
  const float scale = float(s);
  if (kLargestOnly && math::has_fixed_shift<float>(s, double(task.classes))) return;

  SharedMemory shared;
  const int x_stride = x_row(task.dim), steps = depth_steps(task.dim);
  Half* x = shared.take<Half>(kTile * x_stride);
  Half* w = shared.take<Half>(kStages * kTile * kStageRow);
  BFloat16* staging = shared.take<BFloat16>(kTile * kStagingRow);
  float* scratch = shared.take<float>(kWarpsAcross * kTile);
  float* shift = shared.take<float>(kTile);       // kappa of each row, and its target's class; in shared
  int64_t* target = shared.take<int64_t>(kTile);  // memory because registers decide how many blocks fit

  const int64_t row_blocks = tiles_of(task.batch), splits = block_count() / row_blocks;
  // Neighbouring blocks share their classes, which then come from the L2 cache.
  const int64_t first_row = block_id() % row_blocks * kTile, split = block_id() / row_blocks;
  const int64_t first_tile = split * tiles_per_block, all_tiles = tiles_of(task.width);
  const int64_t tiles = first_tile + tiles_per_block < all_tiles ? tiles_per_block : all_tiles - first_tile;
  const int64_t total = tiles * steps;
  const Fragment at;

  // The fetches run kStages - 1 steps ahead; where they are is counted, not divided out of the step.
  int64_t fetch_tile = first_tile;
  int fetch_depth = 0, fetch_stage = 0;
  const auto fetch = [&] {
    if (fetch_tile < first_tile + tiles)
      load_w(task.w_hat, fetch_tile * kTile, task.width, task.dim, fetch_depth,
             w + fetch_stage * kTile * kStageRow);
    copy_async_commit();  // also when empty: a wait counts groups
    fetch_stage = (fetch_stage + 1) % kStages;
    if (++fetch_depth == steps) fetch_depth = 0, ++fetch_tile;
  };

  float sum[2 * kRowSteps], sum_cosine[2 * kRowSteps];
#pragma unroll
  for (int r = 0; r < 2 * kRowSteps; ++r) {
    sum[r] = kLargestOnly ? -INFINITY : 0.0f;
    sum_cosine[r] = 0.0f;
  }
  if (thread_id() < kTile) {  // visible after the first step's barrier
    const int64_t i = first_row + thread_id();
    shift[thread_id()] = i < task.batch ? float(task.rows.at(kShift, i)) : 0.0f;
    target[thread_id()] = i < task.batch ? task.labels[i] - task.first : -1;
  }

  load_x(task.x_hat, first_row, task.batch, task.dim, x);  // lands with the first stage
  for (int stage = 0; stage < kStages - 1; ++stage) fetch();

  float acc[kRowSteps][kColumnSteps][4];
  int64_t tile_first = first_tile * kTile;
  int depth = 0, stage = 0;
  for (int64_t step = 0; step < total; ++step) {
    if (depth == 0)
      for (int m = 0; m < kRowSteps; ++m)
        for (int n = 0; n < kColumnSteps; ++n)
          for (int k = 0; k < 4; ++k) acc[m][n][k] = 0.0f;
    copy_async_wait<kStages - 2>();
    sync_block();  // this step's copies, made by all threads, before its reads; and the last step's reads
                   // before the fetch below overwrites their stage
    fetch();
    multiply_stage(x, x_stride, depth, w + stage * kTile * kStageRow, acc);
    stage = (stage + 1) % kStages;
    if (++depth < steps) continue;

    const int64_t width_left = task.width - tile_first;
#pragma unroll
    for (int r = 0; r < 2 * kRowSteps; ++r) {
      const int row = at.row + r / 2 * 16 + r % 2 * 8;
      const int64_t target_column = target[row] - tile_first;
      const float row_shift = shift[row];
#pragma unroll
      for (int n = 0; n < kColumnSteps; ++n) {
        Vector<BFloat16, 2> pair;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int column = at.column + n * 8 + k;
          const float cosine = acc[r / 2][n][r % 2 * 2 + k];
          const bool counts = column < width_left && column != target_column;
          if constexpr (kLargestOnly) {
            const float z = scale * cosine;
            sum[r] = counts && z > sum[r] ? z : sum[r];
          } else {
            const float e = counts ? std::exp(cosine * scale - row_shift) : 0.0f;
            sum[r] += e;
            sum_cosine[r] += e * cosine;
            pair.at[k] = BFloat16(e);
          }
        }
        if (!kLargestOnly && task.e != nullptr)
          store_vector<2>(staging + row * kStagingRow + at.column + n * 8, pair);
      }
    }
    if constexpr (!kLargestOnly) {
      if (task.e != nullptr) {
        sync_block();  // the staged tile, before it is read across threads
        store_tile(task, first_row, tile_first, staging);
        // The next write to the staging buffer comes after the barrier of a later step.
      }
    }
    depth = 0;
    tile_first += kTile;
  }
  copy_async_wait<0>();  // no copy may be under way when the block ends

  const auto add = [](float a, float b) { return a + b; };
  const auto in_batch = [&](int row) { return first_row + row < task.batch; };
  if constexpr (kLargestOnly) {
    over_row(
        sum, scratch, [](float a, float b) { return a > b ? a : b; },
        [&](int row, float value) {
          if (in_batch(row)) task.largest[split * task.batch + first_row + row] = value;
        });
  } else if (task.partial != nullptr) {
    over_row(sum, scratch, add, [&](int row, float value) {
      if (in_batch(row)) task.partial[split * task.batch + first_row + row] = value;
    });
    over_row(sum_cosine, scratch, add, [&](int row, float value) {
      if (in_batch(row)) task.partial[(splits + split) * task.batch + first_row + row] = value;
    });
  }
}

// Enough blocks for a few rounds over the multiprocessors, so that the last round's idle ones cost little.
int64_t tiles_per_block(const Queue& queue, int64_t batch, int64_t width) {
  const int64_t blocks = 8 * queue.multiprocessors();
  const int64_t wanted_splits = std::max<int64_t>(1, blocks / tiles_of(batch));
  return (tiles_of(width) + wanted_splits - 1) / wanted_splits;
}

template <bool kLargestOnly>
void run(const char* name, Queue& queue, const ScoreExp& task) {
  launch(name, queue, score_exp_kernel<kLargestOnly>,
         Grid{tiles_of(task.batch) * score_splits(queue, task.batch, task.width)}, kThreads,
         score_shared_bytes(task.dim), task, tiles_per_block(queue, task.batch, task.width));
}

}  // namespace

int64_t score_splits(const Queue& queue, int64_t batch, int64_t width) {
  const int64_t per_block = tiles_per_block(queue, batch, width);
  return (tiles_of(width) + per_block - 1) / per_block;
}

size_t score_shared_bytes(int64_t dim) {
  return shared_bytes<Half>(kTile * x_row(dim)) + shared_bytes<Half>(kStages * kTile * kStageRow) +
         shared_bytes<BFloat16>(kTile * kStagingRow) + shared_bytes<float>(kWarpsAcross * kTile) +
         shared_bytes<float>(kTile) + shared_bytes<int64_t>(kTile);
}

void score_largest(Queue& queue, const ScoreExp& task) { run<true>("score_largest", queue, task); }
void score_exp(Queue& queue, const ScoreExp& task) { run<false>("score_exp", queue, task); }

}  // namespace nf
