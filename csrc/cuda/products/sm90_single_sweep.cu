// Two products in one sweep (wgmma, compute capability 9.0): O = exp2(slope Q K^T + offset) V, as sm80_single_sweep.cu
// says, and sums by stretches for the reason given there.
//
//   forward    Q = x_hat    K = w_hat, V = its copy in bfloat16     O = x_sum     offset by row of Q
//   backward   Q = w_hat    K = x_hat, V = weighted features        O = dW        offset by row of K
//
// Here is forward; sm90_sweep_gradient.cu has backward. Blocks fill the device once, with 128 rows and some of the
// classes each, and leave partial sums to a second kernel.
//
// Compiled and emulated so far, and never run on a GPU.
#include "cuda/device/power_exp.cuh"
#include "cuda/products/sm90_two_products.cuh"
#include "cuda/products/sweep_sums.cuh"

namespace nf {
namespace {

// Multiples of a step's classes: kStretch as in sm80_single_sweep.cu; and those over which the tensor cores add up
// x_sum, whose float sums are cut off rather than rounded, so that a long one of like terms falls short.
constexpr int kStretch = 1024, kSegment = 1 << 14;

template <class Term, int kColumns>
NF_KERNEL_RESIDENT(Shape<kColumns>::kThreads, 1)
sm90_single_sweep_kernel(SingleSweep task, NF_TENSOR_MAP x_map, NF_TENSOR_MAP w_map, NF_TENSOR_MAP copy_map,
                         int keys_per_block) {
  using S = Shape<kColumns>;
  SharedMemory shared;
  const Buffers<kColumns> b(shared);
  const int row_blocks = int((task.batch + kTile - 1) / kTile), splits = int(block_count()) / row_blocks;
  // Neighbouring blocks share their classes, which then come from the L2 cache.
  const int first_row = int(block_id()) % row_blocks * kTile, split = int(block_id()) / row_blocks;
  const int begin = split * keys_per_block, width = int(task.width);
  const int end = width - begin < keys_per_block ? width : begin + keys_per_block;

  if (warpgroup_id() == kCopier) {
    registers_down<kForwardCopier>();
    if (thread_id() == kCopier * kWarpgroup) {
      prefetch_map(w_map);
      prefetch_map(copy_map);
      load_rows<kTile, kColumns>(b.q, x_map, first_row, b.q_full);
      typename S::Place at(1);
      feed<kColumns>(b, w_map, copy_map, begin, end, at);
    }
  } else {
    registers_up<kForwardMultiplier>();
    // What this lane holds: rows first_held + 8 h, and columns 8 n + first_column + {0, 1}.
    const int first_held = first_row + warp_id() * 16 + lane_id() / 4;
    const int first_column = lane_id() % 4 * 2;
    math::TermRow<float> rows[2];
    int label[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first_held + 8 * h;
      const bool exists = i < task.batch;
      rows[h] = exists ? math::TermRow<float>{float(task.rows.scale.at(i) * math::kLog2E),
                                              float(task.rows.shift[i] * math::kLog2E), 0.0f}
                       : math::TermRow<float>{};
      label[h] = exists ? int(target_place(task.rows.labels[i], task.first, task.width)) : -1;
    }
    float sum[2] = {}, second[2] = {};
    double total[2] = {}, total_second[2] = {};
    const auto end_stretch = [&] {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        total[h] += double(sum[h]), total_second[h] += double(second[h]);
        sum[h] = second[h] = 0;
      }
    };
    typename S::Place at(0);
    barrier_wait(b.q_full, 0);
    for (int first = begin; first < end; first += kSegment) {
      const auto weigh = [&](int step, const typename S::Place&, float (&scores)[S::kScores]) {
        if (step % (kStretch / S::kKeys) == 0) end_stretch();
        const int key = first + step * S::kKeys;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Term term(rows[h], static_cast<const float*>(nullptr));
          const int exist = end - key - first_column, own = label[h] - key - first_column;
          float part = 0, part_second = 0;       // of this step
          const auto fold = [&]<bool kSome>() {  // kSome: not all of them count
#pragma unroll
            for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
              for (int k = 0; k < 2; ++k) {
                float& value = scores[4 * n + 2 * h + k];
                math::Cell<float> cell = term.at(value, PowerExp());
                if (kSome && (8 * n + k >= exist || 8 * n + k == own)) cell = {};
                part += cell.value;
                part_second += cell.second;
                value = cell.coefficient;
              }
          };
          if (end - key < S::kKeys || unsigned(label[h] - key) < S::kKeys)
            fold.template operator()<true>();
          else
            fold.template operator()<false>();
          sum[h] += part;
          second[h] += part_second;
        }
      };
      const int classes = end - first < kSegment ? end - first : kSegment;
      float out[S::kSums] = {};
      sweep<kColumns>(b, (classes + S::kKeys - 1) / S::kKeys, at, weigh, out);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = first_held + 8 * h;
        if (i >= task.batch) continue;
        float* to = task.x_partial + (int64_t(split) * task.batch + i) * task.dim + first_column;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          if (8 * n >= task.dim) continue;
          Vector<float, 2> pair{{out[4 * n + 2 * h], out[4 * n + 2 * h + 1]}};
          if (first > begin) {
            const auto before = load_vector<2>(to + 8 * n);
            pair = {{before.at[0] + pair.at[0], before.at[1] + pair.at[1]}};
          }
          store_vector_global<2>(to + 8 * n, pair);
        }
      }
    }

    end_stretch();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] += shuffle_xor(total[h], 1);
      total[h] += shuffle_xor(total[h], 2);
      total_second[h] += shuffle_xor(total_second[h], 1);
      total_second[h] += shuffle_xor(total_second[h], 2);
      const int i = first_held + 8 * h;
      if (i >= task.batch || lane_id() % 4 != 0) continue;
      task.sums.value(split, i) = total[h];
      task.sums.second(split, splits, i) = total_second[h];
    }
  }
  barriers_held();
}

// Sums of some rows over the splits, in their order.
constexpr int kAddThreads = 256, kAddRows = 8;
NF_KERNEL(kAddThreads)
add_splits_kernel(SingleSweep task, int64_t splits) {
  SharedMemory shared;
  double* scratch = shared.take<double>(SweepSums::kScratch * kAddThreads);
  const int64_t first = block_id() * kAddRows,
                end = first + kAddRows < task.batch ? first + kAddRows : task.batch;
  add_x_parts<kAddThreads, 16>(task, splits, first, end);
  task.sums.template add<false>(splits, first, end, scratch);
}

int64_t keys_per_block(const Queue& queue, int64_t batch, int64_t dim, int64_t width) {
  return dispatch_columns(dim, [&]<int kColumns>() {
    using S = Shape<kColumns>;
    const int64_t steps = (width + S::kKeys - 1) / S::kKeys;
    const int64_t splits = tiles::sm90_sweep_splits(queue.multiprocessors(), batch);
    return (steps + splits - 1) / splits * S::kKeys;
  });
}

}  // namespace

int64_t sm90_sweep_splits(const Queue& queue, int64_t batch, int64_t dim, int64_t width) {
  const int64_t per_block = keys_per_block(queue, batch, dim, width);
  return (width + per_block - 1) / per_block;
}

void sm90_single_sweep(Queue& queue, const SingleSweep& task) {
  constexpr const char* kName = "single_sweep";
  if (task.batch == 0) return;
  check_counts(kName, task.batch, task.first + task.width);
  const int64_t per_block = keys_per_block(queue, task.batch, task.dim, task.width);
  const int64_t splits = sm90_sweep_splits(queue, task.batch, task.dim, task.width);
  dispatch_columns(task.dim, [&]<int kColumns>() {
    using S = Shape<kColumns>;
    const auto map = [&](const void* data, ScalarType type, int64_t rows, int box) {
      return tensor_map(kName, data, type, rows, task.dim, task.dim, box);
    };
    launch(kName, queue, sm90_single_sweep_kernel<math::SoftmaxTerm<float>, kColumns>,
           Grid{sweep_row_blocks(task.batch) * splits}, S::kThreads, size_t(S::forward_shared()), task,
           map(task.x_hat, ScalarType::Half, task.batch, kTile),
           map(task.w_hat, ScalarType::Half, task.width, S::kKeys),
           map(task.w_copy, ScalarType::BFloat16, task.width, S::kKeys), per_block);
  });
  launch("add_splits", queue, add_splits_kernel, Grid{(task.batch + kAddRows - 1) / kAddRows}, kAddThreads,
         shared_bytes<double>(SweepSums::kScratch * kAddThreads), task, splits);
}

}  // namespace nf
