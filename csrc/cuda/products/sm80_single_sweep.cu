// Two products in one sweep (mma.sync, compute capability 8.0): O = exp2(slope Q K^T + offset) V.
//
//   forward    Q = x_hat    K = w_hat, V = its copy in bfloat16     O = x_sum     offset by row of Q
//   backward   Q = w_hat    K = x_hat, V = weighted features        O = dW        offset by row of K
//
// Because the shift is fixed beforehand, nothing is ever rescaled. Forward splits the classes over blocks; the
// last block of some rows adds up.
//
// A block may have a million classes, over which a float sum of like terms would drift. S and A are therefore
// summed step by step, and every kStretch classes what has come together is added to the block's partial sums,
// in double.
#include <device/arrival.cuh>
#include <device/exp2.cuh>

#include "cuda/products/sm80_two_products.cuh"
#include "cuda/products/sweep_sums.cuh"
#include "math/softmax.h"

namespace nf {
namespace {

constexpr int kStretch = 1024;  // classes, a multiple of those of a step

template <int kColumns>
NF_KERNEL_RESIDENT(Shape<kColumns>::kThreads, Shape<kColumns>::kResident)
single_sweep_kernel(SingleSweep task, int64_t keys_per_block) {
  using S = Shape<kColumns>;
  SharedMemory shared;
  const Buffers<S, kColumns> buffers(shared);
  const int64_t row_blocks = (task.batch + kTile - 1) / kTile, splits = block_count() / row_blocks;
  // Neighbouring blocks share their classes, which then come from the L2 cache.
  const int64_t first_row = block_id() % row_blocks * kTile, split = block_id() / row_blocks;
  const int begin = int(split * keys_per_block);
  const int end = int(begin + keys_per_block < task.width ? begin + keys_per_block : task.width);

  for (int row = thread_id(); row < kTile; row += S::kThreads) {  // visible after the first step's barrier
    const int64_t i = first_row + row;
    const double shift = i < task.batch ? task.rows.shift[i] : 0.0;
    // -inf: no class but the target so far. Its E is 0 only under a finite offset; any will do.
    const auto power =
        math::power_of_two(i < task.batch ? task.rows.scale.at(i) : 0.0, shift == -INFINITY ? 0.0 : shift);
    // The slope is kept from 0, where it makes no difference, so that there is a cosine whose E is 0 and which
    // adds 0 to A: what classes get that do not count.
    buffers.rows[row] = {
        fabsf(power.slope) < 1e-30f ? 1e-30f : power.slope, power.offset,
        i < task.batch ? int(target_place(task.rows.labels[i], task.first, task.width)) : -1};
  }
  fetch_block<kTile, kColumns, S::kThreads>(task.x_hat, first_row, task.batch, 0, task.dim, task.dim,
                                            buffers.q, kColumns, KeyInOrder());  // lands with the first stage
  const auto fetch = [&](int key, int stage) {
    fetch_block<S::kKeys, kColumns, S::kThreads>(task.w_hat, key, end, 0, task.dim, task.dim,
                                                 buffers.keys + stage * S::kPart, kColumns, KeyInOrder());
    fetch_block<S::kKeys, kColumns, S::kThreads>(task.w_copy, key, end, 0, task.dim, task.dim,
                                                 buffers.values + stage * S::kPart, kColumns, KeyInOrder());
  };

  constexpr int kHeldRows = 2 * S::kRowSteps;
  // What this lane holds: rows first_held + 8 r, and columns 8 p + first_column + {0, 1}.
  const int first_held = warp_id() * S::kRowSteps * 16 + lane_id() / 4, first_column = lane_id() % 4 * 2;
  float sum[kHeldRows] = {}, sum_cosine[kHeldRows] = {};
  // The sums of this lane's quad go to memory, where no other thread has a part in them.
  const auto put_sums = [&](bool add) {
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      sum[r] += shuffle_xor(sum[r], 1);
      sum[r] += shuffle_xor(sum[r], 2);
      sum_cosine[r] += shuffle_xor(sum_cosine[r], 1);
      sum_cosine[r] += shuffle_xor(sum_cosine[r], 2);
      const int64_t i = first_row + first_held + 8 * r;
      if (lane_id() % 4 == 0 && i < task.batch) {
        double &of_row = task.sums.value(split, i), &cosine_of_row = task.sums.second(split, splits, i);
        of_row = (add ? of_row : 0.0) + sum[r];
        cosine_of_row = (add ? cosine_of_row : 0.0) + sum_cosine[r];
      }
      sum[r] = sum_cosine[r] = 0;
    }
  };
  const auto weigh = [&](int key, int, float (&scores)[S::kRowSteps][S::kKeys / 8][4]) {
    if (key > begin && (key - begin) % kStretch == 0) put_sums(key - begin > kStretch);
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      const SweepRow row = buffers.rows[first_held + 8 * r];
      if (end - key < S::kKeys || unsigned(row.label - key) < S::kKeys) {
        const float out_of_it = row.slope > 0 ? -3e38f : 3e38f;
#pragma unroll
        for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int place = key + first_column + 8 * n + k;
            if (place >= end || place == row.label) scores[r / 2][n][r % 2 * 2 + k] = out_of_it;
          }
      }
      float part = 0, part_cosine = 0;  // of this step
#pragma unroll
      for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& value = scores[r / 2][n][r % 2 * 2 + k];
          const float e = exp2_or_zero(row.slope * value + row.offset);
          part += e;
          part_cosine += e * value;
          value = e;
        }
      sum[r] += part;
      sum_cosine[r] += part_cosine;
    }
  };
  float out[S::kRowSteps][kColumns / 8][4] = {};
  sweep(buffers, begin, end, fetch, weigh, out);

  put_sums(end - begin > kStretch);
#pragma unroll
  for (int r = 0; r < kHeldRows; ++r) {
    const int64_t i = first_row + first_held + 8 * r;
    if (i >= task.batch) continue;
#pragma unroll
    for (int p = 0; p < kColumns / 8; ++p)
      if (first_column + 8 * p < task.dim)
        store_vector_global<2>(task.x_partial + (split * task.batch + i) * task.dim + first_column + 8 * p,
                               Vector<float, 2>{{out[r / 2][p][r % 2 * 2], out[r / 2][p][r % 2 * 2 + 1]}});
  }
  if (!last_to_arrive(task.sums.arrivals + block_id() % row_blocks, unsigned(splits))) return;

  // In the order of the splits, whoever came last.
  const int64_t end_row = first_row + kTile < task.batch ? first_row + kTile : task.batch;
  add_x_parts<S::kThreads, 8>(task, splits, first_row, end_row);
  task.sums.template add<false>(splits, first_row, end_row, reinterpret_cast<double*>(buffers.q));
}

template <int kColumns>
NF_KERNEL_RESIDENT(Shape<kColumns>::kThreads, Shape<kColumns>::kResident)
sweep_gradient_kernel(SweepGradient task) {
  using S = Shape<kColumns>;
  SharedMemory shared;
  const Buffers<S, kColumns> buffers(shared);
  const int64_t batch = task.classes.batch, dim = task.classes.dim, tile = block_id() * kTile;
  const int first_class = int(task.classes.first + tile);
  fetch_block<kTile, kColumns, S::kThreads>(task.w_hat, tile, task.classes.width, 0, dim, dim, buffers.q,
                                            kColumns, KeyInOrder());  // lands with the first stage
  const auto fetch = [&](int key, int stage) {
    fetch_block<S::kKeys, kColumns, S::kThreads>(task.x_hat, key, batch, 0, dim, dim,
                                                 buffers.keys + stage * S::kPart, kColumns, KeyInOrder());
    fetch_block<S::kKeys, kColumns, S::kThreads>(task.weighted, key, batch, 0, dim, dim,
                                                 buffers.values + stage * S::kPart, kColumns, KeyInOrder());
    const int row = thread_id();
    if (row < S::kKeys)
      copy_async_16(buffers.rows + stage * S::kKeys + row, task.rows + (key + row < batch ? key + row : 0),
                    key + row < batch);
  };

  constexpr int kHeldRows = 2 * S::kRowSteps;
  const int first_held = warp_id() * S::kRowSteps * 16 + lane_id() / 4, first_column = lane_id() % 4 * 2;
  const auto weigh = [&](int, int stage, float (&scores)[S::kRowSteps][S::kKeys / 8][4]) {
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n) {
      // Rows beyond the batch have a finite E, which meets weighted features of 0.
      const SweepRow* rows = buffers.rows + stage * S::kKeys + first_column + 8 * n;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const SweepRow row = rows[k];
        const int own = row.label - first_class;
#pragma unroll
        for (int r = 0; r < kHeldRows; ++r) {
          float& value = scores[r / 2][n][r % 2 * 2 + k];
          value = own == first_held + 8 * r ? 0.0f : exp2_or_zero(row.slope * value + row.offset);
        }
      }
    }
  };
  float out[S::kRowSteps][kColumns / 8][4] = {};
  sweep(buffers, 0, int(batch), fetch, weigh, out);
  finish_class_gradient<typename S::Tile>(
      task.classes, tile, [&](int r, int pair, int k) { return out[r / 2][pair][r % 2 * 2 + k]; },
      reinterpret_cast<float*>(buffers.q), reinterpret_cast<int*>(buffers.rows));
}

// f.template operator()<kColumns>()
template <class F>
auto dispatch_columns(int64_t dim, const F& f) {
  STD_TORCH_CHECK(dim % 8 == 0 && dim <= kSweepColumns,
                  "single_sweep: expected a multiple of 8 columns, at most 256, got ", dim);
  return tiles::dispatch_sweep(dim, f);
}

int64_t keys_per_block(const Queue& queue, int64_t batch, int64_t dim, int64_t width) {
  return dispatch_columns(dim, [&]<int kColumns>() {
    using S = Shape<kColumns>;
    const int64_t steps = (width + S::kKeys - 1) / S::kKeys;
    const int64_t splits = tiles::sweep_splits(queue.multiprocessors(), dim, batch);
    return (steps + splits - 1) / splits * S::kKeys;
  });
}

// Rows and classes are counted in 32 bits inside the kernels.
void check_counts(const char* name, int64_t batch, int64_t classes) {
  constexpr int64_t kMost = INT32_MAX - 256;
  STD_TORCH_CHECK(batch <= kMost && classes <= kMost, name, ": expected at most ", kMost,
                  " rows and classes, got ", batch, " and ", classes);
}

}  // namespace

int64_t sweep_row_blocks(int64_t batch) { return (batch + kTile - 1) / kTile; }

int64_t sweep_splits(const Queue& queue, int64_t batch, int64_t dim, int64_t width) {
  const int64_t per_block = keys_per_block(queue, batch, dim, width);
  return (width + per_block - 1) / per_block;
}

void single_sweep(Queue& queue, const SingleSweep& task) {
  if (task.batch == 0) return;
  check_counts("single_sweep", task.batch, task.first + task.width);
  const int64_t per_block = keys_per_block(queue, task.batch, task.dim, task.width);
  const Grid grid{sweep_row_blocks(task.batch) * sweep_splits(queue, task.batch, task.dim, task.width)};
  dispatch_columns(task.dim, [&]<int kColumns>() {
    launch("single_sweep", queue, single_sweep_kernel<kColumns>, grid, Shape<kColumns>::kThreads,
           size_t(Shape<kColumns>::shared()), task, per_block);
  });
}

void sweep_gradient(Queue& queue, const SweepGradient& task) {
  check_counts("sweep_gradient", task.classes.batch, task.classes.first + task.classes.width);
  dispatch_columns(task.classes.dim, [&]<int kColumns>() {
    launch("sweep_gradient", queue, sweep_gradient_kernel<kColumns>,
           Grid{(task.classes.width + kTile - 1) / kTile}, Shape<kColumns>::kThreads,
           size_t(Shape<kColumns>::shared()), task);
  });
}

}  // namespace nf
