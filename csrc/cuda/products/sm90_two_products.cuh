// O = f(Q K^T) V by wgmma, a tile of the first product at a time: what both kernels of sm90_single_sweep.cu are made
// of.
//
// A block has kTile rows of Q and of O, and two warpgroups that multiply have half of them each; a third copies K and V
// into two rings of stages. What is made of the scores is, as it lies in registers, the left factor of the second
// product. The tensor cores never wait for it: the scores of a step are begun before the second product of the step
// before, which is multiplied while the first become f of themselves. And the two take turns in giving the tensor cores
// work, so that one makes f while the other multiplies.
#pragma once

#include <device/shared_memory.cuh>
#include <device/tensor_map.cuh>
#include <device/warp.cuh>
#include <device/warpgroup.cuh>

#include "cuda/device/mma_tile.cuh"
#include "cuda/products/sm90_single_sweep.h"
#include "engine/tiles_sm90.h"

namespace nf {
namespace {

constexpr int kTile = tiles::Sm90SingleSweep<256>::kTile;
constexpr int kMultipliers = 2, kCopier = kMultipliers;  // warpgroups: 0 and 1, and the one behind them
constexpr int kHalf = kTile / kMultipliers;              // rows of one of them
constexpr int kBoxColumns = tiles::kBlock;

// Registers of a thread, once those that copy have given theirs back: of 168 at the start. Backward's copiers do more.
constexpr int kForwardCopier = 24, kForwardMultiplier = 240, kBackwardCopier = 56, kBackwardMultiplier = 224;
static_assert(kForwardCopier + 2 * kForwardMultiplier <= 3 * 168);
static_assert(kBackwardCopier + 2 * kBackwardMultiplier <= 3 * 168);

// Named barriers: two of turns.
constexpr int kTurn = 1;

template <int kColumns>
struct Shape : tiles::Sm90SingleSweep<kColumns> {
  using Base = tiles::Sm90SingleSweep<kColumns>;
  static constexpr int kScores = Base::kKeys / 2, kSums = kColumns / 2;  // values of a thread
  static_assert(kHalf == 64 && Base::kThreads == (kMultipliers + 1) * kWarpgroup);
  static_assert(Base::kWarps == kMultipliers * kWarpgroup / kWarp);
  using Place = RingPlace<Base::kStages>;
};

// Shared memory of a block. A box of a factor has kBoxColumns columns of all its rows.
template <int kColumns>
struct Buffers {
  using S = Shape<kColumns>;
  Half* q;
  Half* keys;        // [kStages]
  BFloat16* values;  // [kStages]
  Barrier *q_full, *q_free;
  Barrier *keys_full, *keys_free, *values_full, *values_free;  // [kStages] each
  Barrier *rows_full, *rows_free;                              // [kStages], what backward knows of keys
  Barrier* counts_free;                                        // [2], what it counts of a tile

  NF_DEVICE explicit Buffers(SharedMemory& shared)
      : q(shared.take_boxes<Half>(S::kFactors)),
        keys(q + kTile * kColumns),
        values(reinterpret_cast<BFloat16*>(keys + S::kStages * S::kPart)),
        q_full(shared.take<Barrier>(S::kBarriers)),
        q_free(q_full + 1),
        keys_full(q_full + 2),
        keys_free(keys_full + S::kStages),
        values_full(keys_free + S::kStages),
        values_free(values_full + S::kStages),
        rows_full(values_free + S::kStages),
        rows_free(rows_full + S::kStages),
        counts_free(rows_free + S::kStages) {
    if (thread_id() == 0) {
      barrier_init(q_full, 1);
      barrier_init(q_free, kMultipliers);
      for (int stage = 0; stage < S::kStages; ++stage) {
        barrier_init(keys_full + stage, 1);
        barrier_init(keys_free + stage, kMultipliers);
        barrier_init(values_full + stage, 1);
        barrier_init(values_free + stage, kMultipliers);
        barrier_init(rows_full + stage, 1);
        barrier_init(rows_free + stage, S::kWarps);
      }
      for (int tile = 0; tile < 2; ++tile) barrier_init(counts_free + tile, S::kWarps);
      fence_barriers();
    }
    sync_block();  // the barriers, before anyone comes to them
  }
};

// The rows [first, first + kRows) of a matrix. One thread.
template <int kRows, int kColumns, class T>
NF_DEVICE void load_rows(T* shared, const TensorMap& map, int64_t first, Barrier* full) {
  barrier_arrive_expect(full, unsigned(kRows * kColumns * sizeof(T)));
#pragma unroll
  for (int c = 0; c < kColumns; c += kBoxColumns) load_box(shared + c * kRows, map, first, c, full);
}

// The keys [begin, end) and their values, in steps, as they are needed and given back: values a step behind. One thread.
template <int kColumns>
NF_DEVICE void feed(const Buffers<kColumns>& b, const TensorMap& keys, const TensorMap& values, int begin,
                    int end, typename Shape<kColumns>::Place& at) {
  using S = Shape<kColumns>;
  const auto load_values = [&](int key, const typename S::Place& of) {
    barrier_wait(b.values_free + of.stage, of.parity);
    load_rows<S::kKeys, kColumns>(b.values + of.stage * S::kPart, values, key, b.values_full + of.stage);
  };
  auto before = at;
  for (int key = begin; key < end; key += S::kKeys) {
    barrier_wait(b.keys_free + at.stage, at.parity);
    load_rows<S::kKeys, kColumns>(b.keys + at.stage * S::kPart, keys, key, b.keys_full + at.stage);
    if (key > begin) load_values(key - S::kKeys, before);
    before = at;
    at.advance();
  }
  if (begin < end) load_values(begin + (end - begin - 1) / S::kKeys * S::kKeys, before);
}

// out += f(Q K^T) V over `steps` > 0 stages from `at` on, of the calling warpgroup's rows; Q has come.
// `weigh(step, at, scores)` makes f of them, and may be overtaken by the other warpgroup's.
template <int kColumns, class Weigh>
NF_DEVICE void sweep(const Buffers<kColumns>& b, int steps, typename Shape<kColumns>::Place& at,
                     const Weigh& weigh, float (&out)[kColumns / 2]) {
  using S = Shape<kColumns>;
  constexpr int kWaiting = kMultipliers * kWarpgroup;
  // Where one of them has half of the registers for `out`, there are few scores, and too little to gain.
  constexpr bool kTurns = kColumns <= 128;
  // From a lane that all agree on: what is made of it is the same in all of them, and needs no register of each.
  const int me = shuffle(warpgroup_id(), 0), other = 1 - me;
  const bool speaks = thread_id() % kWarpgroup == 0;
  const Half* q = b.q + me * kHalf * kBoxColumns;
  float scores[S::kScores];
  uint32_t factor[S::kKeys / 16][4];
  const auto start_scores = [&] {
    const Half* keys = b.keys + at.stage * S::kPart;
#pragma unroll
    for (int d = 0; d < kColumns; d += 16) {
      const int box = d / kBoxColumns * kBoxColumns;
      wgmma<Half, Lies::kColumnsOfK, Lies::kColumnsOfK>(scores, columns_of_k(q + box * kTile + d - box),
                                                        columns_of_k(keys + box * S::kKeys + d - box), d > 0);
    }
    wgmma_commit();
  };
  const auto start_sums = [&](int stage) {
    const BFloat16* values = b.values + stage * S::kPart;
#pragma unroll
    for (int n = 0; n < S::kKeys / 16; ++n)
      wgmma<BFloat16, Lies::kRowsOfK>(out, factor[n],
                                      rows_of_k(values + n * 16 * kBoxColumns, S::kKeys * kBoxBytes), true);
    wgmma_commit();
  };
  const auto pack = [&] {
#pragma unroll
    for (int n = 0; n < S::kKeys / 16; ++n)
#pragma unroll
      for (int part = 0; part < 4; ++part)
        factor[n][part] = pack_bf16(scores[8 * n + 2 * part], scores[8 * n + 2 * part + 1]);
  };

  barrier_wait(b.keys_full + at.stage, at.parity);
  wgmma_fence(scores);
  start_scores();
  wgmma_wait<0>(scores);
  if (speaks) barrier_arrive(b.keys_free + at.stage);
  if (kTurns && me == 1 && steps > 1) arrive_threads(kTurn, kWaiting);  // the other has the first turn
  weigh(0, at, scores);
  pack();
  for (int step = 1; step < steps; ++step) {
    const auto before = at;
    at.advance();
    barrier_wait(b.keys_full + at.stage, at.parity);
    barrier_wait(b.values_full + before.stage, before.parity);
    if (kTurns) sync_threads(kTurn + me, kWaiting);
    wgmma_fence(scores, out, factor);
    start_scores();
    start_sums(before.stage);
    if (kTurns && (me == 0 || step < steps - 1)) arrive_threads(kTurn + other, kWaiting);
    wgmma_wait<1>(scores);
    if (speaks) barrier_arrive(b.keys_free + at.stage);
    weigh(step, at, scores);
    wgmma_wait<0>(out);
    if (speaks) barrier_arrive(b.values_free + before.stage);
    pack();
  }
  barrier_wait(b.values_full + at.stage, at.parity);
  wgmma_fence(out, factor);
  start_sums(at.stage);
  wgmma_wait<0>(out);
  if (speaks) barrier_arrive(b.values_free + at.stage);
  at.advance();
}

// f.template operator()<kColumns>()
template <class F>
auto dispatch_columns(int64_t dim, const F& f) {
  STD_TORCH_CHECK(dim % 8 == 0 && dim <= tiles::kSm90SweepColumns,
                  "single_sweep: expected a multiple of 8 columns, at most 256, got ", dim);
  return tiles::dispatch_sweep(dim, f);
}

// Rows and classes are counted in 32 bits inside the kernels.
void check_counts(const char* name, int64_t batch, int64_t classes) {
  constexpr int64_t kMost = INT32_MAX - (1 << 15);  // and some more
  STD_TORCH_CHECK(batch <= kMost && classes <= kMost, name, ": expected at most ", kMost,
                  " rows and classes, got ", batch, " and ", classes);
}

}  // namespace
}  // namespace nf
