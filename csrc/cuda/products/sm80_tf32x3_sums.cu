// x_sum = E w_hat of float32 on tensor cores (mma.sync, compute capability 8.0), three products of tf32 for one
// (tf32x3.cuh).
//
// A block owns a tile of x_sum over a stretch of classes. E and w_hat stream through kStages buffers of kDepth classes:
// E is read by ldmatrix, w_hat value by value, since its rows are what is summed over. What the stretches give is added
// in double, in their order, by a second kernel.
//
// These kernels have only been compiled and emulated so far.
#include <device/shared_memory.cuh>

#include "cuda/device/mma_tile.cuh"
#include "cuda/device/per_row.cuh"
#include "cuda/device/tf32x3.cuh"
#include "cuda/products/sm80_tf32x3.h"

namespace nf {
namespace {

using S = tiles::Sm80Tf32Sums;

constexpr int kRowSteps = S::kWarpRows / 16, kColumnSteps = S::kWarpColumns / 8;
constexpr int kSteps = 2;  // of 8 classes, summed on tensor cores

NF_KERNEL_RESIDENT(S::kThreads, S::kResident)
tf32_sums_kernel(Tf32Sums task, int64_t stretch) {
  SharedMemory shared;
  float* stages = shared.take<float>(S::kStages * S::kStage);
  const int64_t row_blocks = S::row_blocks(task.batch), tiles = row_blocks * S::column_blocks(task.dim);
  // Neighbouring blocks share their classes, which then come from the L2 cache.
  const int64_t tile = block_id() % tiles, split = block_id() / tiles;
  const int64_t first_row = tile % row_blocks * S::kRows;
  const int first_column = int(tile / row_blocks) * S::kColumns, dim = int(task.dim);
  const int64_t end = (split + 1) * stretch < task.width ? (split + 1) * stretch : task.width;

  const auto fetch = [&](int64_t j, int stage) {
    if (j < end) {
      float* e = stages + stage * S::kStage;
      fetch_block<S::kRows, S::kDepth, S::kThreads>(task.e, first_row, task.batch, j, task.columns,
                                                    task.stride, e, S::kDepth, KeyInOrder());
      fetch_block<S::kDepth, S::kColumns, S::kThreads>(task.w_hat, j, task.width, first_column, dim, dim,
                                                       e + S::kRows * S::kDepth, S::kColumnStride, KeyNone());
    }
    copy_async_commit();  // also when empty: a wait counts groups
  };

  const int down = warp_id() / S::kAcross * S::kWarpRows, across = warp_id() % S::kAcross * S::kWarpColumns;
  const int matrix = lane_id() / 8, i = lane_id() % 8;  // which of the four an ldmatrix reads, its row
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int of_e = (down + matrix % 2 * 8 + i) * S::kDepth, e_chunk = swizzled<float>(matrix / 2 * 4, i);
  const int of_w = S::kRows * S::kDepth + t * S::kColumnStride + across + g;
  float sum[kColumnSteps][kRowSteps][4] = {};
  fetch(split * stretch, 0);
  int stage = 0;
  for (int64_t j = split * stretch; j < end; j += S::kDepth) {
    copy_async_wait<0>();
    sync_block();  // this stage's copies, made by all threads, before its reads; and the last stage's reads
                   // before the fetch below overwrites it
    fetch(j + S::kDepth, stage ^ 1);
    const float* e = stages + stage * S::kStage + of_e;
    const float* w = stages + stage * S::kStage + of_w;
#pragma unroll 1  // registers
    for (int k = 0; k < S::kDepth; k += 8 * kSteps) {
      Tf32Left a[kRowSteps][kSteps];
#pragma unroll
      for (int m = 0; m < kRowSteps; ++m)
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint32_t words[4];
          load_matrix_x4(words, e + m * 16 * S::kDepth + (e_chunk ^ (k + 8 * step)));
#pragma unroll
          for (int r = 0; r < 4; ++r) a[m][step].split_word(r, words[r]);
        }
#pragma unroll
      for (int n = 0; n < kColumnSteps; ++n) {
        Tf32Right b[kSteps];
#pragma unroll
        for (int r = 0; r < 2 * kSteps; ++r) b[r / 2].split(r % 2, w[(k + r * 4) * S::kColumnStride + n * 8]);
        multiply_tf32x3(a, b, sum[n]);
      }
    }
    stage ^= 1;
  }
  copy_async_wait<0>();  // no copy may be under way when the block ends

#pragma unroll
  for (int n = 0; n < kColumnSteps; ++n)
#pragma unroll
    for (int r = 0; r < 2 * kRowSteps; ++r) {
      const int64_t row = first_row + down + 8 * r + g;
      const int column = first_column + across + 8 * n + 2 * t;
      if (row < task.batch && column < dim)
        store_vector_global<2>(task.partial + (split * task.batch + row) * dim + column,
                               Vector<float, 2>{{sum[n][r / 2][r % 2 * 2], sum[n][r / 2][r % 2 * 2 + 1]}});
    }
}

NF_KERNEL(kThreads)
tf32_add_parts_kernel(const float* __restrict__ partial, int64_t splits, int64_t count, bool add,
                      float* x_sum) {
  const int64_t i = block_id() * kThreads + thread_id();
  if (i >= count) return;
  double sum = add ? double(x_sum[i]) : 0.0;
#pragma unroll 4
  for (int64_t split = 0; split < splits; ++split) sum += double(partial[split * count + i]);
  x_sum[i] = float(sum);
}

int64_t stretch_of(const Queue& queue, int64_t batch, int64_t dim, int64_t width) {
  return S::stretch(queue.multiprocessors(), batch, dim, width);
}

}  // namespace

int64_t tf32_sum_splits(const Queue& queue, int64_t batch, int64_t dim, int64_t width) {
  const int64_t stretch = stretch_of(queue, batch, dim, width);
  return (width + stretch - 1) / stretch;
}

void tf32_sums(Queue& queue, const Tf32Sums& task) {
  const int64_t splits = tf32_sum_splits(queue, task.batch, task.dim, task.width);
  const Grid grid{splits * S::row_blocks(task.batch) * S::column_blocks(task.dim)};
  launch("tf32_sums", queue, tf32_sums_kernel, grid, S::kThreads, size_t(S::shared()), task,
         stretch_of(queue, task.batch, task.dim, task.width));
  launch("tf32_add_parts", queue, tf32_add_parts_kernel, thread_per(task.batch * task.dim), kThreads, 0,
         task.partial, splits, task.batch * task.dim, task.add, task.x_sum);
}

}  // namespace nf
