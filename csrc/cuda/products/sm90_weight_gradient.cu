// dW = P(E^T weighted + targets) by wgmma; class_gradient.cuh has what follows the product.
//
// A block owns some classes and all columns, and walks over such tiles. One thread of its first warpgroup fetches: boxes
// of E and of the weighted features through a ring of stages, kDepth rows of the batch each, and after them the tile's
// rows of W through the same ring. So while a tile is finished the next one's product is already being fetched. Two
// warpgroups multiply; then each warp turns the rows of W in its stage into dW (sm90_class_strip.cuh), where they
// lie, and a bulk copy takes them away. A second warp of the first warpgroup counts meanwhile which classes are
// targets. Nothing is summed across blocks. Those of a cluster go in step: each copies its share of the weighted
// features into all of them, which halves what comes from the L2 cache.
//
// It has been compiled and emulated, and not run on a GPU yet.
#include "cuda/products/sm90_class_strip.cuh"
#include "cuda/products/sm90_gradient_ring.cuh"
#include "cuda/products/sm90_weight_gradient.h"

namespace nf {
namespace {

// Named barriers: of all that multiply, and the first of those of the two warps that share a strip.
constexpr int kAllBarrier = 1, kPairBarriers = 2;

// A warp of those that multiply.
template <class Tile, class W>
class Multiplier {
  using S = Shape<Tile>;
  static_assert(S::kStrip == nf::kStrip);
  static constexpr int kValues = S::kWide / 2;

 public:
  NF_DEVICE Multiplier(const Room<Tile>& room, const ClassGradient& task)
      : room_(room), task_(task), warp_(warp_id() - kWarpgroup / kWarp), group_(warpgroup_id() - 1) {}

  NF_DEVICE void run(const TensorMap& dw) {
    RingPlace<1> counts(0);
    unsigned buffer = 0;
    each_tile<Tile>(task_.width, [&](int64_t tile) {
      float g[S::kDown][kValues];
      multiply(g);
#pragma unroll
      for (int m = 0; m < S::kDown; ++m) turn_strip<W>(g[m]);
      barrier_wait(room_.counted, counts.parity);
      add_targets_of(tile, g);
      sync_warp();  // all lanes' reads of the counts
      if (lane_id() == 0) barrier_arrive(room_.taken);
      finish(tile, g, dw, room_.radial + buffer * S::kAcross * S::kClasses);
      counts.advance();
      buffer ^= 1;
    });
    wait_stores<0>();
  }

 private:
  // Strips and columns of the warpgroup's m-th product.
  NF_DEVICE int strip(int m) const {
    return (S::kAcross == 1 ? group_ * S::kDown + m : m) * (kWarpgroup / kWarp) +
           warp_ % (kWarpgroup / kWarp);
  }
  NF_DEVICE int first_column() const { return S::kAcross == 1 ? 0 : group_ * S::kWide; }

  // Every block of the cluster copies into the stage.
  NF_DEVICE void release(int stage) const {
    if constexpr (S::kCluster == 1) {
      if (lane_id() == 0) barrier_arrive(room_.empty + stage);
    } else {
      if (lane_id() < S::kCluster) barrier_arrive_of(room_.empty + stage, lane_id());
    }
  }
  // A stage whose rows are being copied away is given back when the warp has begun something else: the ring is longer
  // than a tile's parts, so what it begins is there by then.
  NF_DEVICE void release_copied() {
    static_assert(S::kParts < S::kStages);
    if (copied_ < 0) return;
    if (lane_id() == 0) wait_stores_read<0>();
    sync_warp();  // that wait, before the stage is given to others
    release(copied_);
    copied_ = -1;
  }

  NF_DEVICE void multiply(float (&g)[S::kDown][kValues]) {
    int last = -1;
#pragma unroll
    for (int m = 0; m < S::kDown; ++m) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) g[m][i] = 0.0f;
      wgmma_fence(g[m]);
    }
    for (int64_t row = 0; row < task_.batch; row += S::kDepth, at_.advance()) {
      barrier_wait(room_.full + at_.stage, at_.parity);
      const char* e = room_.stage(at_.stage) + (S::kAcross == 1 ? group_ * S::kDown * S::kBox : 0);
      const char* v = room_.stage(at_.stage) + S::kFactorA + first_column() / 64 * S::kBox;
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < S::kDepth; k += 16)
#pragma unroll
        for (int m = 0; m < S::kDown; ++m)
          wgmma<BFloat16, Lies::kRowsOfK, Lies::kRowsOfK>(g[m],
                                                          rows_of_k(e + m * S::kBox + k * kBoxBytes, S::kBox),
                                                          rows_of_k(v + k * kBoxBytes, S::kBox), true);
      wgmma_commit();
      wgmma_wait<1>();  // the stage before this one has been read
      release_copied();
      if (last >= 0) release(last);
      last = at_.stage;
    }
    if constexpr (S::kDown == 1)
      wgmma_wait<0>(g[0]);
    else
      wgmma_wait<0>(g[0], g[1]);
    release(last);
  }

  // Of the row `place` of the tile, f(a pair of its values, the first one's column among those of the warpgroup).
  template <class F>
  NF_DEVICE void each_of(int place, float (&g)[S::kDown][kValues], const F& f) const {
#pragma unroll
    for (int m = 0; m < S::kDown; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (strip(m) * kStrip + strip_class(h) == place)
#pragma unroll
          for (int j = 0; j < kValues / 4; ++j)
            f(g[m][4 * j + 2 * h], g[m][4 * j + 2 * h + 1], strip_column<W>(j));
  }

  // Classes that rows have as their target pass through shared memory, some at a time.
  NF_DEVICE void add_targets_of(int64_t tile, float (&g)[S::kDown][kValues]) const {
    float* const own = room_.targets + first_column();
    const auto meet = [] { sync_threads(kAllBarrier, S::kWarps * kWarp); };
#pragma unroll 1
    for (int base = 0; base < S::kClasses; base += kWarp) {
      // The same in all warps.
      const int place = base + lane_id();
      unsigned hits = warp_ballot(tile + place < task_.width && room_.counts[place] > 0);
#pragma unroll 1
      while (hits != 0) {
        unsigned left = hits;
#pragma unroll 1
        for (int k = 0; k < S::kTargetRows && left != 0; ++k, left &= left - 1)
          each_of(base + lowest_bit(left), g, [&](float& a, float& b, int column) {
            store_vector<2>(own + k * S::kColumns + column, Vector<float, 2>{{a, b}});
          });
        meet();  // the writes above, before the rows are added to
        left = hits;
#pragma unroll 1
        for (int k = 0; k < S::kTargetRows && left != 0; ++k, left &= left - 1)
          if (k == warp_) {
            const int hit = base + lowest_bit(left);
            add_targets(task_, task_.first + tile + hit, room_.counts[hit], room_.targets + k * S::kColumns);
          }
        meet();  // the sums, before they are read
        left = hits;
#pragma unroll 1
        for (int k = 0; k < S::kTargetRows && left != 0; ++k, left &= left - 1)
          each_of(base + lowest_bit(left), g, [&](float& a, float& b, int column) {
            const auto sum = load_vector<2>(own + k * S::kColumns + column);
            a = sum.at[0], b = sum.at[1];
          });
        hits = left;
        meet();  // those reads, before the next classes' writes
      }
    }
  }

  NF_DEVICE void finish(int64_t tile, float (&g)[S::kDown][kValues], const TensorMap& dw, float* radial) {
    constexpr int kStrips = S::kPartClasses / kStrip, kWide = kBoxBytes / int(sizeof(W));
#pragma unroll 1
    for (int part = 0; part < S::kParts; ++part, at_.advance()) {
      bool own = false;
#pragma unroll
      for (int m = 0; m < S::kDown; ++m) own |= strip(m) / kStrips == part;
      if (own) release_copied();
      barrier_wait(room_.full + at_.stage, at_.parity);
#pragma unroll
      for (int m = 0; m < S::kDown; ++m) {
        if (strip(m) / kStrips != part) continue;
        char* const rows = room_.stage(at_.stage) + strip(m) % kStrips * kStrip * kBoxBytes +
                           first_column() / kWide * S::kWBox;
        const int64_t first = tile + strip(m) * kStrip;
        finish_strip<W>(task_, first, first_column(), g[m], StripRows<W>(rows, S::kWBox),
                        [&](float (&sums)[2]) { over_columns(sums, radial + strip(m) * kStrip); });
        fence_shared_for_bulk();
        sync_warp();  // all lanes' rows, before they are copied
        if (lane_id() == 0) {
          for (int box = 0; box < S::kWide / kWide; ++box)
            store_box(dw, first, first_column() + box * kWide, rows + box * S::kWBox);
          commit_stores();
        }
        copied_ = at_.stage;
      }
      if (!own) release(at_.stage);
    }
  }

  // Sums of what the lanes of a row have, and of the other half of the columns. `shared`: of the strip.
  NF_DEVICE void over_columns(float (&sums)[2], float* shared) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sums[h] += shuffle_xor(sums[h], 1);
      sums[h] += shuffle_xor(sums[h], 2);
    }
    if constexpr (S::kAcross > 1) {
      if (lane_id() % 4 == 0)
        for (int h = 0; h < 2; ++h) shared[group_ * S::kClasses + strip_class(h)] = sums[h];
      // The other warp's writes, before they are read. It writes the same place two tiles from here, after it has
      // met this warp once more.
      sync_threads(kPairBarriers + warp_ % (kWarpgroup / kWarp), S::kAcross * kWarp);
      for (int h = 0; h < 2; ++h) sums[h] = shared[strip_class(h)] + shared[S::kClasses + strip_class(h)];
    }
  }

  const Room<Tile>& room_;
  const ClassGradient& task_;
  const int warp_, group_;
  RingPlace<S::kStages> at_{0};
  int copied_ = -1;
};

template <class Tile, class W>
NF_KERNEL_RESIDENT(Shape<Tile>::kThreads, 1)
sm90_weight_gradient_kernel(NF_TENSOR_MAP e, NF_TENSOR_MAP weighted, NF_TENSOR_MAP w, NF_TENSOR_MAP dw,
                            ClassGradient task) {
  using S = Shape<Tile>;
  SharedMemory shared;
  const Room<Tile> room(shared);
  if (thread_id() == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(room.full + stage, 1);
      barrier_init(room.empty + stage, S::kWarps * S::kCluster);
    }
    barrier_init(room.counted, 1);
    barrier_init(room.taken, S::kWarps);
    fence_barriers();
  }
  const auto meet = [] {
    if constexpr (S::kCluster == 1)
      sync_block();
    else
      sync_cluster();
  };
  meet();  // the barriers, before anyone uses them
  if (warpgroup_id() == 0) {
    registers_down<56>();
    if (thread_id() == 0) fetch_tiles<Tile, W>(room, e, weighted, w, task);
    if (warp_id() == 1) count_tiles(room, task);
  } else {
    registers_up<224>();
    Multiplier<Tile, W>(room, task).run(dw);
  }
  if constexpr (S::kCluster > 1) meet();  // no block ends that another one still tells of a stage
  barriers_held();
}

}  // namespace

void sm90_weight_gradient(Queue& queue, const WeightGradient& task) {
  const ClassGradient& of = task.classes;
  STD_TORCH_CHECK(
      of.dim % 8 == 0 && of.dim <= tiles::kSm90GradientColumns && takes_sm90_weight_gradient(task),
      "sm90_weight_gradient: expected rows, and a multiple of 8 columns, at most 512, got [", of.batch, ", ",
      of.dim, "]");
  if (of.width == 0) return;
  constexpr const char* kName = "sm90_weight_gradient";
  tiles::dispatch_sm90_gradient(of.dim, [&]<class Tile>() {
    using S = Shape<Tile>;
    const auto classes = [&](const StoredArray& from, int64_t skipped, int rows) {
      const ScalarType type = ScalarType(from.type);
      char* const first =
          static_cast<char*>(from.data) + (of.first - skipped) * of.dim * (type == ScalarType::Float ? 4 : 2);
      return tensor_map(kName, first, type, of.width, of.dim, of.dim, rows);
    };
    const TensorMap e =
        tensor_map(kName, task.e, ScalarType::BFloat16, of.batch, of.width, task.stride, S::kDepth);
    const TensorMap weighted =
        tensor_map(kName, task.weighted, ScalarType::BFloat16, of.batch, of.dim, of.dim, S::kDepth);
    const TensorMap w = classes(of.weight, 0, S::kPartClasses), dw = classes(of.dw, of.dw_first, kStrip);
    const int64_t clusters = tiles::ceil_div(of.width, S::kClasses * S::kCluster);
    const int64_t most = tiles::at_least_one(queue.multiprocessors() / S::kCluster);
    const Grid grid{.x = S::kCluster * std::min(clusters, most), .cluster = S::kCluster};
    dispatch_stored(ScalarType(of.weight.type), [&]<class W>() {
      if constexpr (sizeof(W) < 8)
        launch("sm90_weight_gradient", queue, sm90_weight_gradient_kernel<Tile, W>, grid, S::kThreads,
               size_t(S::shared()), e, weighted, w, dw, of);
    });
  });
}

}  // namespace nf
