// Sizes of the tiles of the CUDA kernels that make products, and the shared memory of their blocks. The kernels
// (cuda/products) are built from these, and products.h asks them which shapes a device can take: torch-free and
// CUDA-free, since that is asked without a GPU too.
#pragma once

#include <cstdint>

namespace nf::tiles {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t at_least_one(int64_t a) { return a > 1 ? a : 1; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Of `count` values; arrays begin at multiples of 16 bytes.
constexpr int64_t array_bytes(int64_t count, int64_t item) { return ceil_div(count * item, 16) * 16; }

constexpr int kBlock = 64;  // columns within which a row's 16-byte chunks are exchanged (mma_tile.cuh)
constexpr int64_t padded_columns(int64_t columns) { return ceil_div(columns, kBlock) * kBlock; }

// Rows of the class tile that are finished at a time, of each warp along the classes (class_gradient.cuh).
constexpr int kRoundRows = 8;

// Classes and columns of dW that a block holds, and its scratch: a round's rows, 8 values longer than they are.
template <int kDown_, int kAcross_, int kRounds_, int kPairs_>
struct Held {
  static constexpr int kDown = kDown_, kAcross = kAcross_, kRounds = kRounds_, kPairs = kPairs_;
  static constexpr int kWarpClasses = kRounds * kRoundRows, kClasses = kDown * kWarpClasses;
  static constexpr int kColumns = kAcross * kPairs * 8;
  // Of a row in shared memory: with 8 more, the four rows that half a warp writes lie in different banks.
  static constexpr int kStride = kColumns + 8;
  // Shared scratch: a round's rows, and how many targets each class has.
  static constexpr int kScratch = kDown * kRoundRows * kStride;
};

// sm80_scores.cu. kAcross warps along the classes, 64 each.
struct Sm80Scores {
  static constexpr int kTile = 128;  // rows
  static constexpr int kStages = 3;
  static constexpr int kWarpColumns = 64;
  // Tiles of a block: what it adds up in float, tile by tile, must not drift.
  static constexpr int64_t kMostTiles = 256;

  // What a term keeps of every row beside its target's place, and its numbers: at most so many.
  static constexpr int kMostPerRow = 3, kMostNumbers = 6;

  static constexpr int64_t shared(int across, int64_t dim, int per_row, int numbers) {
    const int64_t x = array_bytes(kTile * padded_columns(dim), 2);
    const int64_t w = array_bytes(int64_t(kStages) * across * kWarpColumns * kBlock, 2);
    return x + w + (1 + per_row) * array_bytes(kTile, 4) + array_bytes(numbers, 4);
  }
  // Eight warps, and two blocks per multiprocessor; or sixteen, where x_hat takes so much shared memory that
  // there is room for one block only.
  static constexpr int across(int64_t dim, int64_t shared_limit) {
    return padded_columns(dim) > 256 && shared(4, dim, kMostPerRow, kMostNumbers) <= shared_limit ? 4 : 2;
  }
  static constexpr int64_t row_blocks(int64_t batch) { return ceil_div(batch, kTile); }
  // Enough blocks for a few rounds over the multiprocessors, so that the last round's idle ones cost little.
  static constexpr int64_t blocks(int across, int64_t multiprocessors) {
    return (across == 2 ? 8 : 4) * multiprocessors;
  }
  static constexpr int64_t tiles_per_block(int across, int64_t multiprocessors, int64_t batch,
                                           int64_t width) {
    const int64_t splits = at_least_one(blocks(across, multiprocessors) / at_least_one(row_blocks(batch)));
    const int64_t tiles = ceil_div(ceil_div(width, across * kWarpColumns), splits);
    return tiles < kMostTiles ? tiles : kMostTiles;
  }
};

// sm80_weight_gradient.cu. kAcross warps along the columns, 64 each.
template <int kAcross>
struct Sm80WeightGradient {
  static constexpr int kDepth = 32;  // rows of the batch per stage: two product steps
  static constexpr int kDown = kAcross < 8 ? 8 / kAcross : 2;
  static constexpr int kClasses = 32 * kDown;
  static constexpr int kColumns = 64 * kAcross;
  static constexpr int kStages = kAcross < 8 ? 3 : 2;
  static constexpr int kStage = kDepth * (kClasses + kColumns);  // values
  static constexpr int64_t shared() { return array_bytes(kStages * kStage, 2) + array_bytes(kClasses, 4); }
};

// sm80_single_sweep.cu, for rows of kColumns.
template <int kColumns>
struct Sm80SingleSweep {
  static constexpr int kTile = 128;
  static constexpr int kRowSteps = kColumns <= 128 ? 2 : 1;  // of 16 rows, for a warp
  static constexpr int kWarps = kTile / (16 * kRowSteps);
  static constexpr int kKeys = kColumns <= 128 ? 32 : 16;  // rows of K and V per stage
  static constexpr int kStages = kColumns <= 128 ? 3 : 2;
  static constexpr int kResident = kColumns <= 128 ? 2 : 1;
  static constexpr int kPart = kKeys * kColumns;                           // values of a stage of K, or of V
  static constexpr int kFactors = kTile * kColumns + 2 * kStages * kPart;  // values of Q and all stages
  static constexpr int kRows = kTile > kStages* kKeys ? kTile : kStages * kKeys;
  static constexpr int64_t shared() { return array_bytes(kFactors, 2) + array_bytes(kRows, 16); }
};

constexpr int64_t kSm80SweepColumns = 256;  // most of a row
constexpr int64_t kSm80GradientColumns =
    512;  // a block owns all columns of its classes: the radial part sums

// f.template operator()<kColumns>() with the least shape that has room for the row.
template <class F>
constexpr auto dispatch_sweep(int64_t dim, const F& f) {
  if (dim <= 64) return f.template operator()<64>();
  if (dim <= 128) return f.template operator()<128>();
  return f.template operator()<256>();
}

// The same for the kernels of dW, with kAcross.
template <class F>
constexpr auto dispatch_gradient(int64_t dim, const F& f) {
  if (dim <= 128) return f.template operator()<2>();
  if (dim <= 256) return f.template operator()<4>();
  return f.template operator()<8>();
}

// Single sweep: blocks along the classes, in one round of all that fit on the device at a time.
constexpr int64_t sweep_splits(int64_t multiprocessors, int64_t dim, int64_t batch) {
  return dispatch_sweep(dim, [&]<int kColumns>() {
    using S = Sm80SingleSweep<kColumns>;
    return at_least_one(S::kResident * multiprocessors / at_least_one(ceil_div(batch, S::kTile)));
  });
}

// sm80_tf32x3_scores.cu: four warps, two along the rows and two along the classes. Three blocks share a
// multiprocessor, so that one takes exponentials while others multiply.
struct Sm80Tf32Scores {
  static constexpr int kThreads = 128, kResident = 3;
  static constexpr int kAcross = 2, kWarpRows = 32, kWarpClasses = 64;
  static constexpr int kRows = kThreads / 32 / kAcross * kWarpRows, kClasses = kAcross * kWarpClasses;
  static constexpr int kDepth = 32;  // columns per stage: all banks
  static constexpr int kStages = 2;
  static constexpr int kStage = (kRows + kClasses) * kDepth;
  static constexpr int kSums = 3 * kAcross * kRows;
  // Of a row its TermRow and its target's place.
  static constexpr int64_t shared() {
    return array_bytes(kStages * kStage, 4) + array_bytes(kSums, 8) + array_bytes(3 * kRows, 4) +
           array_bytes(kRows, 4) + array_bytes(Sm80Scores::kMostNumbers, 4);
  }
  static constexpr int64_t row_blocks(int64_t batch) { return ceil_div(batch, kRows); }
  // Enough blocks for a few rounds over the multiprocessors, so that the last round's idle ones cost little.
  static constexpr int64_t tiles_per_block(int64_t multiprocessors, int64_t batch, int64_t width) {
    const int64_t blocks = 4 * kResident * multiprocessors;
    return at_least_one(
        ceil_div(ceil_div(width, kClasses), at_least_one(blocks / at_least_one(row_blocks(batch)))));
  }
};

// sm80_tf32x3_sums.cu: four warps, two along the rows and two along the columns.
struct Sm80Tf32Sums {
  static constexpr int kThreads = 128, kResident = 3;
  static constexpr int kAcross = 2, kWarpRows = 32, kWarpColumns = 64;
  static constexpr int kRows = kThreads / 32 / kAcross * kWarpRows, kColumns = kAcross * kWarpColumns;
  static constexpr int kColumnStride = kColumns + 8;  // as in Sm80Tf32Gradient
  static constexpr int kDepth = 32;                   // classes per stage: all banks
  static constexpr int kStages = 2;
  static constexpr int kStage = kRows * kDepth + kDepth * kColumnStride;
  static constexpr int kLeastStretch = 8 * kDepth;  // classes of a block
  static constexpr int64_t shared() { return array_bytes(kStages * kStage, 4); }
  static constexpr int64_t row_blocks(int64_t batch) { return ceil_div(batch, kRows); }
  static constexpr int64_t column_blocks(int64_t dim) { return ceil_div(dim, kColumns); }
  static constexpr int64_t blocks(int64_t multiprocessors) { return 2 * kResident * multiprocessors; }
  static constexpr int64_t stretch(int64_t multiprocessors, int64_t batch, int64_t dim, int64_t width) {
    const int64_t tiles = at_least_one(row_blocks(batch) * column_blocks(dim));
    const int64_t splits = at_least_one(blocks(multiprocessors) / tiles);
    return most(ceil_div(ceil_div(width, splits), kDepth) * kDepth, kLeastStretch);
  }
};

// sm80_tf32x3_gradient.cu. kAcross warps along the columns, 64 each.
template <int kAcross>
struct Sm80Tf32Gradient {
  static constexpr int kDown = kAcross < 8 ? 8 / kAcross : 2;
  static constexpr int kClasses = 32 * kDown, kColumns = 64 * kAcross;
  // Of a row in shared memory: with 8 more, four rows lie in different banks.
  static constexpr int kClassStride = kClasses + 8, kColumnStride = kColumns + 8;
  static constexpr int kDepth = 16;  // rows of the batch per stage
  static constexpr int kStages = 3;
  // Of a stage: E, the weighted features, and the rows' powers from kPowers on.
  static constexpr int kPowers = kDepth * (kClassStride + kColumnStride), kStage = kPowers + kDepth;
  static constexpr int64_t shared() { return array_bytes(kStages * kStage, 4) + array_bytes(kClasses, 4); }
};

constexpr int64_t kTf32GradientColumns = 512;  // dW needs all columns in one block

// simt_products.cu, on values of kItem bytes. Of rows of eight a thread has a value in each; float64 has half as
// many, for its registers.
template <int kItem>
constexpr int kSimtRounds = 16 / kItem;

template <int kItem>
struct SimtScores {
  static constexpr int kThreads = 256;
  static constexpr int kWarpRows = 8 * kSimtRounds<kItem>, kRows = 4 * kWarpRows;
  static constexpr int kClasses = 128;
  static constexpr int kDepth = 128 / kItem;  // columns per stage: all banks
  static constexpr int kStages = 2;
  static constexpr int kStage = (kRows + kClasses) * kDepth;
  static constexpr int64_t shared() { return array_bytes(kStages * kStage, kItem); }
};

template <int kItem, int kAcross>
struct SimtWeightGradient {
  static constexpr int kDown = kAcross < 8 ? 8 / kAcross : 2;
  using Tile = Held<kDown, kAcross, kSimtRounds<kItem>, 8>;
  static constexpr int kDepth = 64 / kItem;  // rows of the batch per stage
  static constexpr int kStages = 2;
  static constexpr int kStage = kDepth * (Tile::kClasses + Tile::kColumns);
  static constexpr int kValues = kStages * kStage > Tile::kScratch ? kStages * kStage : Tile::kScratch;
  static constexpr int64_t shared() { return array_bytes(kValues, kItem) + array_bytes(Tile::kClasses, 4); }
};

constexpr int64_t kSimtColumns = 512;  // dW needs all columns in one block

// The most shared memory that a family asks for: what products.h holds against the device.

constexpr int64_t sm80_scores_shared(int64_t dim) {
  return Sm80Scores::shared(2, dim, Sm80Scores::kMostPerRow, Sm80Scores::kMostNumbers);
}
constexpr int64_t sm80_weight_gradient_shared(int64_t dim) {
  const int64_t gradient =
      dispatch_gradient(dim, [&]<int kAcross>() { return Sm80WeightGradient<kAcross>::shared(); });
  return most(sm80_scores_shared(dim), gradient);
}
constexpr int64_t sm80_single_sweep_shared(int64_t dim) {
  return dispatch_sweep(dim, [&]<int kColumns>() { return Sm80SingleSweep<kColumns>::shared(); });
}
template <int kItem>
constexpr int64_t simt_shared(int64_t dim) {
  const int64_t gradient =
      dispatch_gradient(dim, [&]<int kAcross>() { return SimtWeightGradient<kItem, kAcross>::shared(); });
  return most(SimtScores<kItem>::shared(), gradient);
}

constexpr int64_t sm80_tf32x3_shared(int64_t dim) {
  const int64_t gradient =
      dispatch_gradient(dim, [&]<int kAcross>() { return Sm80Tf32Gradient<kAcross>::shared(); });
  return most(most(Sm80Tf32Scores::shared(), Sm80Tf32Sums::shared()), gradient);
}

}  // namespace nf::tiles
