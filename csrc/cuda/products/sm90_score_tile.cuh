// A consumer's tile of scores for sm90_scores.cu: its product, and sums along the rows of the block.
#pragma once

#include <device/mbarrier.cuh>
#include <device/shared_memory.cuh>
#include <device/warp.cuh>
#include <device/warpgroup.cuh>

#include "engine/tiles_sm90.h"

namespace nf {
namespace {

using Tiles = tiles::Sm90Scores;
using tiles::kBlock;

constexpr int kTile = Tiles::kTile, kStages = Tiles::kStages, kBox = Tiles::kBox;
constexpr int kThreads = (1 + Tiles::kConsumers) * kWarpgroup;
constexpr int kBoxLoad = kBox * int(sizeof(Half));  // bytes

// A consumer's tile is two halves of 64 rows x 128 classes. Of each a lane has two rows, and of those pairs of
// neighbouring classes: 8 j + 2 (lane % 4) + {0, 1}.
constexpr int kHalves = 2, kHalfRows = 64, kRegisters = kHalfRows * Tiles::kClasses / kWarpgroup;
constexpr int kHeldRows = 2 * kHalves;
constexpr int kPairs = kBlock / 8;  // of 64 classes

NF_DEVICE int held_row(int r) { return r / 2 * kHalfRows + warp_id() % 4 * 16 + r % 2 * 8 + lane_id() / 4; }

// Barriers of some warps: that of all consumers, and for each the one of its turn to multiply.
constexpr int kAllConsumers = 1, kTurns = 2;

// The consumers, without the producer.
struct Consumers {
  static constexpr int kCount = Tiles::kConsumers * kWarpgroup;
  NF_DEVICE int threads() const { return kCount; }
  NF_DEVICE int me() const { return thread_id() - kWarpgroup; }
  NF_DEVICE void sync() const { sync_threads(kAllConsumers, kCount); }
};

// Which stages are there, and which may be filled again.
struct Pipeline {
  Barrier* x;      // [columns / 64], of x_hat's boxes
  Barrier* full;   // [kStages]
  Barrier* empty;  // [kStages]
};

// acc = x_hat w_hat^T of a tile, whose boxes of classes are the next `steps` of the ring. `all_there` is called when
// the last of them has come.
template <class AllThere>
NF_DEVICE void multiply_tile(const Half* x, const Half* w, const Pipeline& pipeline, int steps,
                             bool first_tile, const AllThere& all_there, RingPlace<kStages>& at,
                             float (&acc)[kHalves][kRegisters]) {
  const bool frees = thread_id() % kWarpgroup == 0;  // for its warpgroup, whose products end together
  Barrier* before = nullptr;
  for (int step = 0; step < steps; ++step) {
    if (first_tile) barrier_wait(pipeline.x + step, 0);
    barrier_wait(pipeline.full + at.stage, at.parity);
    wgmma_fence(acc[0], acc[1]);
#pragma unroll
    for (int k = 0; k < kBlock; k += 16)
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        wgmma<Half, Lies::kColumnsOfK, Lies::kColumnsOfK>(
            acc[half], columns_of_k(x + step * kBox + half * kHalfRows * kBlock + k),
            columns_of_k(w + at.stage * kBox + k), step + k > 0);
    wgmma_commit();
    wgmma_wait<1>();  // the step before has read its stage
    if (frees && before != nullptr) barrier_arrive(before);
    before = pipeline.empty + at.stage;
    at.advance();
  }
  all_there();
  wgmma_wait<0>(acc[0], acc[1]);
  if (frees) barrier_arrive(before);
}

}  // namespace
}  // namespace nf
