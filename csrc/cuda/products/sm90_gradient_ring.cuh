// What sm90_weight_gradient.cu is made of but for the arithmetic: its shared memory, the order of tiles, and the two
// warps that fetch and count.
#pragma once

#include <device/cluster.cuh>
#include <device/warpgroup.cuh>

#include "cuda/device/class_gradient.cuh"
#include "engine/tiles_sm90.h"

namespace nf {
namespace {

template <class Tile>
struct Shape : Tile {
  using T = Tile;
  static constexpr int kWarps = T::kMultipliers * kWarpgroup / kWarp;  // that multiply
  static constexpr int kThreads = (1 + T::kMultipliers) * kWarpgroup;
  static constexpr int kBox = T::kDepth * kBoxBytes;        // of 64 classes or columns
  static constexpr int kFactorA = T::kClasses / 64 * kBox;  // bytes of E in a stage
  static constexpr int kWBox = T::kPartClasses * kBoxBytes;
};

// f(the block's next tile), as often in each block of a cluster: the last ones may have no class.
template <class Tile, class F>
NF_DEVICE void each_tile(int64_t width, const F& f) {
  const int64_t classes = Tile::kClasses, rank = block_id() % Tile::kCluster;
  for (int64_t tile = block_id() * classes; tile - rank * classes < width; tile += block_count() * classes)
    f(tile);
}

// What the roles share.
template <class Tile>
struct Room {
  using S = Shape<Tile>;
  char* stages;
  float* targets;  // [kTargetRows, kColumns]
  int* counts;     // [kClasses]
  float* radial;   // [2, kAcross, kClasses]: of this tile and the last
  Barrier *full, *empty;
  Barrier *counted, *taken;  // of counts

  NF_DEVICE explicit Room(SharedMemory& shared)
      : stages(shared.take_boxes<char>(S::kStages * S::kStageBytes)),
        targets(shared.take<float>(S::kTargetRows * S::kColumns)),
        counts(shared.take<int>(S::kClasses)),
        radial(shared.take<float>(2 * S::kAcross * S::kClasses)),
        full(shared.take<Barrier>(S::kStages)),
        empty(shared.take<Barrier>(S::kStages)),
        counted(shared.take<Barrier>(1)),
        taken(shared.take<Barrier>(1)) {}

  NF_DEVICE char* stage(int k) const { return stages + k * S::kStageBytes; }
};

// Boxes of a tile in the order of their use. One thread.
template <class Tile, class W>
NF_DEVICE void fetch_tiles(const Room<Tile>& room, const TensorMap& e, const TensorMap& weighted,
                           const TensorMap& w, const ClassGradient& task) {
  using S = Shape<Tile>;
  RingPlace<S::kStages> at(1);
  const auto next = [&](int bytes) {
    barrier_wait(room.empty + at.stage, at.parity);
    barrier_arrive_expect(room.full + at.stage, bytes);
    return room.stage(at.stage);
  };
  each_tile<Tile>(task.width, [&](int64_t tile) {
    for (int64_t row = 0; row < task.batch; row += S::kDepth, at.advance()) {
      char* stage = next(S::kStageBytes);
      for (int box = 0; box < S::kClasses / 64; ++box)
        load_box(stage + box * S::kBox, e, row, tile + box * 64, room.full + at.stage);
      for (int box = int(block_id() % S::kCluster); box < S::kColumns / 64; box += S::kCluster) {
        char* to = stage + S::kFactorA + box * S::kBox;
        if constexpr (S::kCluster == 1)
          load_box(to, weighted, row, box * 64, room.full + at.stage);
        else
          load_box_to_all<S::kCluster>(to, weighted, row, box * 64, room.full + at.stage);
      }
    }
    constexpr int kWide = kBoxBytes / int(sizeof(W));
    for (int part = 0; part < S::kParts; ++part, at.advance()) {
      char* stage = next(S::kPartClasses * S::kColumns * int(sizeof(W)));
      for (int box = 0; box < S::kColumns / kWide; ++box)
        load_box(stage + box * S::kWBox, w, tile + part * S::kPartClasses, box * kWide, room.full + at.stage);
    }
  });
}

// How many rows have each class of a tile as their target. One warp.
template <class Tile>
NF_DEVICE void count_tiles(const Room<Tile>& room, const ClassGradient& task) {
  using S = Shape<Tile>;
  RingPlace<1> at(1);
  each_tile<Tile>(task.width, [&](int64_t tile) {
    barrier_wait(room.taken, at.parity);
    for (int c = lane_id(); c < S::kClasses; c += kWarp) room.counts[c] = 0;
    sync_warp();  // the zeros, before anyone counts
#pragma unroll 4
    for (int64_t i = lane_id(); i < task.batch; i += kWarp)
      count_target(task, tile, S::kClasses, i, task.labels[i], room.counts);
    sync_warp();  // all lanes' counts, before they are announced
    if (lane_id() == 0) barrier_arrive(room.counted);
    at.advance();
  });
}

}  // namespace
}  // namespace nf
