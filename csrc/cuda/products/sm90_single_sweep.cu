// Two products in one sweep (wgmma, compute capability 9.0): O = exp2(slope Q K^T + offset) V, as sm80_single_sweep.cu
// says, and sums by stretches for the reason given there.
//
//   forward    Q = x_hat    K = w_hat, V = its copy in bfloat16     O = x_sum     offset by row of Q
//   backward   Q = w_hat    K = x_hat, V = weighted features        O = dW        offset by row of K
//
// Blocks fill the device once. Forward's have some classes of 128 rows each, and leave partial sums to a second
// kernel. Backward's go from tile to tile of classes: while one is finished, w_hat of the next comes.
//
// Compiled and emulated so far, and never run on a GPU.
#include "cuda/device/power_exp.cuh"
#include "cuda/products/sm90_class_gradient.cuh"
#include "cuda/products/sm90_two_products.cuh"

namespace nf {
namespace {

constexpr int kStretch = 1024;  // classes, a multiple of those of a step

template <class Term, int kColumns>
NF_KERNEL_RESIDENT(Shape<kColumns>::kThreads, 1)
sm90_single_sweep_kernel(SingleSweep task, NF_TENSOR_MAP x_map, NF_TENSOR_MAP w_map, NF_TENSOR_MAP copy_map,
                         int64_t keys_per_block) {
  using S = Shape<kColumns>;
  SharedMemory shared;
  const Buffers<kColumns> b(shared);
  const int64_t row_blocks = (task.batch + kTile - 1) / kTile, splits = block_count() / row_blocks;
  // Neighbouring blocks share their classes, which then come from the L2 cache.
  const int64_t first_row = block_id() % row_blocks * kTile, split = block_id() / row_blocks;
  const int begin = int(split * keys_per_block);
  const int end = int(begin + keys_per_block < task.width ? begin + keys_per_block : task.width);

  if (warpgroup_id() == kCopier) {
    registers_down<kForwardCopier>();
    if (thread_id() == kCopier * kWarpgroup) {
      load_rows<kTile, kColumns>(b.q, x_map, first_row, b.q_full);
      typename S::Place at(1);
      feed<kColumns>(b, w_map, copy_map, begin, end, at);
    }
  } else {
    registers_up<kForwardMultiplier>();
    // What this lane holds: rows first_held + 8 h, and columns 8 n + first_column + {0, 1}.
    const int64_t first_held = first_row + warp_id() * 16 + lane_id() / 4;
    const int first_column = lane_id() % 4 * 2;
    math::TermRow<float> rows[2];
    int label[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t i = first_held + 8 * h;
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
    const auto weigh = [&](int step, const typename S::Place&, float (&scores)[S::kScores]) {
      if (step % (kStretch / S::kKeys) == 0) end_stretch();
      const int key = begin + step * S::kKeys;
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
    float out[S::kSums] = {};
    typename S::Place at(0);
    barrier_wait(b.q_full, 0);
    sweep<kColumns>(b, (end - begin + S::kKeys - 1) / S::kKeys, at, weigh, out);

    end_stretch();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] += shuffle_xor(total[h], 1);
      total[h] += shuffle_xor(total[h], 2);
      total_second[h] += shuffle_xor(total_second[h], 1);
      total_second[h] += shuffle_xor(total_second[h], 2);
      const int64_t i = first_held + 8 * h;
      if (i >= task.batch) continue;
      if (lane_id() % 4 == 0) {
        task.sums.value(split, i) = total[h];
        task.sums.second(split, splits, i) = total_second[h];
      }
      float* to = task.x_partial + (split * task.batch + i) * task.dim + first_column;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
        if (8 * n < task.dim)
          store_vector_global<2>(to + 8 * n, Vector<float, 2>{{out[4 * n + 2 * h], out[4 * n + 2 * h + 1]}});
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
  for (int64_t at4 = first * task.dim + 4 * thread_id(); at4 < end * task.dim; at4 += 4 * kAddThreads) {
    Vector<float, 4> total = {};
    if (task.add) total = load_vector<4>(task.x_sum + at4);
#pragma unroll 8
    for (int64_t k = 0; k < splits; ++k) {
      const auto part = load_vector<4>(task.x_partial + k * task.batch * task.dim + at4);
      for (int e = 0; e < 4; ++e) total.at[e] += part.at[e];
    }
    store_vector_global<4>(task.x_sum + at4, total);
  }
  task.sums.template add<false>(splits, first, end, scratch);
}

// What a stage of backward says of its keys: whether they are not all alike to their terms, and whether a class of the
// tile is the target of one.
constexpr int kMixed = 1, kOwn = 2;

template <class Term, int kColumns>
NF_KERNEL_RESIDENT(Shape<kColumns>::kThreads, 1)
sm90_sweep_gradient_kernel(SweepGradient task, NF_TENSOR_MAP w_map, NF_TENSOR_MAP x_map,
                           NF_TENSOR_MAP weighted_map) {
  using S = Shape<kColumns>;
  SharedMemory shared;
  const Buffers<kColumns> b(shared);
  SweepRow* rows = shared.take<SweepRow>(S::kStages * S::kKeys);
  int* kinds = shared.take<int>(S::kStages);
  int* counts = shared.take<int>(2 * kTile);  // of two tiles: rows that have the class for a target
  float* target_rows = shared.take<float>(S::kWarps * kColumns);
  const int batch = int(task.classes.batch), steps = (batch + S::kKeys - 1) / S::kKeys;
  const int tiles = int((task.classes.width + kTile - 1) / kTile);

  if (warpgroup_id() == kCopier) {
    registers_down<kBackwardCopier>();
    const int warp = warp_id() % (kWarpgroup / kWarp);
    if (warp == 0 && lane_id() == 0) {
      RingPlace<1> q(1);
      typename S::Place at(1);
      for (int tile = int(block_id()); tile < tiles; tile += int(block_count()), q.advance()) {
        barrier_wait(b.q_free, q.parity);
        load_rows<kTile, kColumns>(b.q, w_map, int64_t(tile) * kTile, b.q_full);
        feed<kColumns>(b, x_map, weighted_map, 0, batch, at);
      }
    } else if (warp == 1) {
      RingPlace<2> place(1);
      typename S::Place at(1);
      for (int tile = int(block_id()); tile < tiles; tile += int(block_count()), place.advance()) {
        const int first_class = int(task.classes.first) + tile * kTile;
        int* own_rows = counts + place.stage * kTile;
        barrier_wait(b.counts_free + place.stage, place.parity);
        for (int c = lane_id(); c < kTile; c += kWarp) own_rows[c] = 0;
        sync_warp();  // the zeros, before other lanes count
        for (int key = 0; key < batch; key += S::kKeys, at.advance()) {
          barrier_wait(b.rows_free + at.stage, at.parity);
          const SweepRow first = task.rows[key];
          int mine = 0;  // of this lane's keys
          for (int r = lane_id(); r < S::kKeys; r += kWarp) {
            // Beyond the batch they have a finite E, which meets weighted features of 0.
            const SweepRow row = key + r < batch ? task.rows[key + r] : SweepRow{0, 0, -1};
            rows[at.stage * S::kKeys + r] = row;
            if (row.slope != first.slope || row.offset != first.offset) mine |= kMixed;
            const int c = row.label - first_class;
            if (unsigned(c) < kTile) {
              mine |= kOwn;
              if (task.classes.target[key + r] != 0.0) atomic_add(own_rows + c, 1);
            }
          }
          const int kind = (warp_any(mine & kMixed) ? kMixed : 0) | (warp_any(mine & kOwn) ? kOwn : 0);
          if (lane_id() == 0) kinds[at.stage] = kind;
          sync_warp();  // what all lanes wrote, before one of them says so
          if (lane_id() == 0) barrier_arrive(b.rows_full + at.stage);
        }
      }
    }
  } else {
    registers_up<kBackwardMultiplier>();
    const int first_held = warp_id() * kWarpClasses + lane_id() / 4, first_column = lane_id() % 4 * 2;
    RingPlace<1> q(0);
    RingPlace<2> place(0);
    typename S::Place at(0);
    for (int tile = int(block_id()); tile < tiles; tile += int(block_count()), q.advance(), place.advance()) {
      const int first_class = int(task.classes.first) + tile * kTile;
      const auto weigh = [&](int, const typename S::Place& of, float (&scores)[S::kScores]) {
        barrier_wait(b.rows_full + of.stage, of.parity);
        const int kind = kinds[of.stage];
        const SweepRow* mine = rows + of.stage * S::kKeys + first_column;
        const auto fold = [&](const SweepRow& row, int n, int k) {
          const Term term({row.slope, -row.offset, 0.0f}, static_cast<const float*>(nullptr));
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& value = scores[4 * n + 2 * h + k];
            value = term.at(value, PowerExp()).coefficient;
          }
        };
        if (kind & kMixed) {
#pragma unroll
          for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
            for (int k = 0; k < 2; ++k) fold(mine[8 * n + k], n, k);
        } else {
          const SweepRow row = mine[0];
#pragma unroll
          for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
            for (int k = 0; k < 2; ++k) fold(row, n, k);
        }
        if (kind & kOwn) {
#pragma unroll
          for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              const int own = mine[8 * n + k].label - first_class;
#pragma unroll
              for (int h = 0; h < 2; ++h)
                if (own == first_held + 8 * h) scores[4 * n + 2 * h + k] = 0.0f;
            }
        }
        sync_warp();  // the reads of all lanes, before one of them says so
        if (lane_id() == 0) barrier_arrive(b.rows_free + of.stage);
      };
      float out[S::kSums] = {};
      barrier_wait(b.q_full, q.parity);
      if (steps > 0) sweep<kColumns>(b, steps, at, weigh, out);
      if (thread_id() % kWarpgroup == 0) barrier_arrive(b.q_free);
      finish_held_classes<kColumns>(task.classes, int64_t(tile) * kTile + warp_id() * kWarpClasses,
                                    counts + place.stage * kTile + warp_id() * kWarpClasses,
                                    target_rows + warp_id() * kColumns, out);
      sync_warp();  // the reads of all lanes, before one of them says so
      if (lane_id() == 0) barrier_arrive(b.counts_free + place.stage);
    }
  }
  barriers_held();
}

// f.template operator()<kColumns>()
template <class F>
auto dispatch_columns(int64_t dim, const F& f) {
  STD_TORCH_CHECK(dim % 8 == 0 && dim <= tiles::kSm90SweepColumns,
                  "single_sweep: expected a multiple of 8 columns, at most 256, got ", dim);
  return tiles::dispatch_sweep(dim, f);
}

int64_t keys_per_block(const Queue& queue, int64_t batch, int64_t dim, int64_t width) {
  return dispatch_columns(dim, [&]<int kColumns>() {
    using S = Shape<kColumns>;
    const int64_t steps = (width + S::kKeys - 1) / S::kKeys;
    const int64_t splits = tiles::sm90_sweep_splits(queue.multiprocessors(), batch);
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

void sm90_sweep_gradient(Queue& queue, const SweepGradient& task) {
  constexpr const char* kName = "sweep_gradient";
  const int64_t batch = task.classes.batch, dim = task.classes.dim, width = task.classes.width;
  if (width == 0) return;
  check_counts(kName, batch, task.classes.first + width);
  dispatch_columns(dim, [&]<int kColumns>() {
    using S = Shape<kColumns>;
    const TensorMap w = tensor_map(kName, task.w_hat, ScalarType::Half, width, dim, dim, kTile);
    const auto keys = [&](const void* data, ScalarType type) {  // of an empty batch nobody loads any
      return batch > 0 ? tensor_map(kName, data, type, batch, dim, dim, S::kKeys) : w;
    };
    const int64_t tiles = (width + kTile - 1) / kTile;
    launch(kName, queue, sm90_sweep_gradient_kernel<math::SoftmaxTerm<float>, kColumns>,
           Grid{tiles < queue.multiprocessors() ? tiles : queue.multiprocessors()}, S::kThreads,
           size_t(S::backward_shared()), task, w, keys(task.x_hat, ScalarType::Half),
           keys(task.weighted, ScalarType::BFloat16));
  });
}

}  // namespace nf
