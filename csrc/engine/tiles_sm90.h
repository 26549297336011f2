// The same of the kernels for compute capability 9.0 (tiles.h).
#pragma once

#include "engine/tiles.h"

namespace nf::tiles {

// sm90_scores.cu: a producer of boxes, and consumers that take the tiles of a block in turn.
struct Sm90Scores {
  static constexpr int kTile = 128, kClasses = 128;  // rows and classes
  static constexpr int kMostColumns = 512;           // x_hat's rows stay in shared memory
  static constexpr int kBox = 128 * kBlock;  // values of x_hat's rows, or of the classes, of 64 columns
  static constexpr int kStages = 5;          // of classes
  static constexpr int kConsumers = 2;       // warpgroups
  static constexpr int kStoreRows = 16,
                       kStore = kStoreRows * kBlock;  // of E, of each of a consumer's four warps
  static constexpr int kBarriers = kMostColumns / kBlock + 2 * kStages;
  static constexpr int64_t kMostTiles = Sm80Scores::kMostTiles;
  static constexpr int kMostPerRow = Sm80Scores::kMostPerRow, kMostNumbers = Sm80Scores::kMostNumbers;

  static constexpr int64_t shared(int64_t dim, int per_row, int numbers) {
    return array_bytes((padded_columns(dim) / kBlock + kStages) * kBox + kConsumers * 4 * kStore, 2) +
           array_bytes(kBarriers, 8) + array_bytes(1, 4) + (1 + per_row) * array_bytes(kTile, 4) +
           array_bytes(numbers, 4);
  }
  static constexpr int64_t row_blocks(int64_t batch) { return ceil_div(batch, kTile); }
  // One block has a multiprocessor for itself. Of some rounds over all of them, those that leave the fewest tiles
  // idle; a block begins and ends in the time of some two tiles.
  static constexpr int kMostRounds = 8;
  static constexpr int64_t tiles_per_block(int64_t multiprocessors, int64_t batch, int64_t width) {
    const int64_t rows = at_least_one(row_blocks(batch)), all = at_least_one(ceil_div(width, kClasses));
    int64_t best = 0, least = 0;
    for (int64_t rounds = 1; rounds <= kMostRounds; ++rounds) {
      const int64_t wanted = ceil_div(all, at_least_one(rounds * multiprocessors / rows));
      const int64_t tiles = wanted < kMostTiles ? wanted : kMostTiles;
      const int64_t time = ceil_div(rows * ceil_div(all, tiles), multiprocessors) * (tiles + 2);
      if (best == 0 || time < least) best = tiles, least = time;
    }
    return best;
  }
};

// sm90_weight_gradient.cu. Two warpgroups multiply; each has kDown_ tiles of 64 classes x kWide_ columns, and they stand
// along the classes or, with kAcross_ = 2, along the columns. kCluster_ blocks share what they read of the features.
template <int kAcross_, int kDown_, int kWide_, int kCluster_>
struct Sm90WeightGradient {
  static constexpr int kCluster = kCluster_;
  static constexpr int kAcross = kAcross_, kDown = kDown_, kWide = kWide_;
  static constexpr int kMultipliers = 2;  // warpgroups
  static constexpr int kClasses = 64 * kDown * kMultipliers / kAcross;
  static constexpr int kColumns = kWide * kAcross;
  static constexpr int kDepth = 32;  // rows of the batch per stage
  static constexpr int kStageBytes = 2 * kDepth * (kClasses + kColumns);
  static constexpr int kStages = 216 * 1024 / kStageBytes;
  // After a tile's product its rows of W pass through the stages, so many classes each.
  static constexpr int kStrip = 16;  // classes of a warp
  static constexpr int kPartClasses = kStrip * (kStageBytes >= 2 * kStrip * 4 * kColumns ? 2 : 1);
  static constexpr int kParts = kClasses / kPartClasses;
  static_assert(kStageBytes >= 4 * kPartClasses * kColumns);
  static constexpr int kTargetRows = 4;  // of classes that rows have as their target, finished at a time

  static constexpr int64_t shared() {
    return int64_t(kStages) * kStageBytes + array_bytes(kTargetRows * kColumns, 4) +
           array_bytes(kClasses, 4) + array_bytes(2 * kAcross * kClasses, 4) + 2 * array_bytes(kStages, 8) +
           2 * array_bytes(1, 8);
  }
};

constexpr int64_t kSm90GradientColumns = 512;

// f.template operator()<S>() with the one for these columns.
template <class F>
constexpr auto dispatch_sm90_gradient(int64_t dim, const F& f) {
  if (dim <= 128) return f.template operator()<Sm90WeightGradient<1, 2, 128, 1>>();
  if (dim <= 256) return f.template operator()<Sm90WeightGradient<1, 1, 256, 2>>();
  return f.template operator()<Sm90WeightGradient<2, 1, 256, 2>>();
}

// sm90_single_sweep.cu, for rows of kColumns: two warpgroups that multiply, of 64 rows each, and one that copies.
template <int kColumns>
struct Sm90SingleSweep {
  static constexpr int kTile = 128, kThreads = 3 * 128, kWarps = 8;  // that multiply
  // The scores' factors both come from shared memory: for 64 keys as slowly as they are multiplied, for 128 at 3/4 of
  // that. At 256 columns there are no registers for so many.
  static constexpr int kKeys = kColumns <= 128 ? 128 : 64;
  static constexpr int kStages = kColumns <= 64 ? 4 : 2;
  static constexpr int kPart = kKeys * kColumns;                           // values of a stage of K, or of V
  static constexpr int kFactors = kTile * kColumns + 2 * kStages * kPart;  // values of Q and all stages
  static constexpr int kBarriers = 4 + 6 * kStages;
  static constexpr int64_t forward_shared() { return array_bytes(kFactors, 2) + array_bytes(kBarriers, 8); }
  static constexpr int64_t backward_shared() {
    return forward_shared() + array_bytes(kStages * kKeys, 16) + array_bytes(kStages, 4) +
           array_bytes(2 * kTile, 4) + array_bytes(kWarps * kColumns, 4);
  }
};

constexpr int64_t kSm90SweepColumns = 256;  // most of a row

constexpr int64_t sm90_sweep_splits(int64_t multiprocessors, int64_t batch) {
  return at_least_one(multiprocessors / at_least_one(ceil_div(batch, Sm90SingleSweep<64>::kTile)));
}

// The most shared memory that a family asks for.

constexpr int64_t sm90_scores_shared(int64_t dim) {
  return Sm90Scores::shared(dim, Sm90Scores::kMostPerRow, Sm90Scores::kMostNumbers);
}
constexpr int64_t sm90_weight_gradient_shared(int64_t dim) {
  const int64_t gradient = dispatch_sm90_gradient(dim, [&]<class S>() { return S::shared(); });
  return most(sm90_scores_shared(dim), gradient);
}
constexpr int64_t sm90_single_sweep_shared(int64_t dim) {
  return dispatch_sweep(dim, [&]<int kColumns>() { return Sm90SingleSweep<kColumns>::backward_shared(); });
}

}  // namespace nf::tiles
