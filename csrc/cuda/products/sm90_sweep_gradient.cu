// Backward of the single sweep by wgmma: dW of a tile of classes from two products (sm90_two_products.cuh) and what
// follows them.
//
// Blocks fill the device once and go from tile to tile: while one is finished, w_hat of the next comes, and its first
// keys. A second warp that copies brings what is known of the keys, and looks there for the targets of the tile.
//
// Compiled and emulated so far, and never run on a GPU.
#include "cuda/device/power_exp.cuh"
#include "cuda/products/sm90_class_gradient.cuh"
#include "cuda/products/sm90_two_products.cuh"

namespace nf {
namespace {

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
      prefetch_map(x_map);
      prefetch_map(weighted_map);
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

}  // namespace

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
