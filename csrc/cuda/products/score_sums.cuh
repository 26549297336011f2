// What leaves a kernel of scores besides E: the sums of its block's rows, or their largest logits.
#pragma once

#include <device/warp.cuh>

#include "cuda/products/score_task.h"

namespace nf {
namespace {

// Sums (or the maximum) of a row over the lanes and parts of the team that share it, in a fixed order; of r its row is
// held_row(r), and `part` is the thread's. scratch is [kParts, kRows]. `combine` of two values, `put(row, value)` once
// per row of the block.
template <int kRows, int kParts, class Team, int kHeld, class HeldRow, class Combine, class Put>
NF_DEVICE void over_row(const Team& team, int part, const HeldRow& held_row, float (&mine)[kHeld],
                        float* scratch, const Combine& combine, const Put& put) {
#pragma unroll
  for (int r = 0; r < kHeld; ++r) {
    mine[r] = combine(mine[r], shuffle_xor(mine[r], 1));
    mine[r] = combine(mine[r], shuffle_xor(mine[r], 2));
  }
  team.sync();  // the products' reads of what is scratch now, and an earlier use of it, before these writes
  if (lane_id() % 4 == 0)
#pragma unroll
    for (int r = 0; r < kHeld; ++r) scratch[part * kRows + held_row(r)] = mine[r];
  team.sync();  // the writes above, before the reads below
  if (team.me() < kRows) {
    float value = scratch[team.me()];
    for (int p = 1; p < kParts; ++p) value = combine(value, scratch[p * kRows + team.me()]);
    put(team.me(), value);
  }
}

// The largest logits, or the block's partial sums of its rows, to their places. over(mine, combine, put): over_row.
template <bool kLargestOnly, bool kLargest, int kHeld, class Over>
NF_DEVICE void put_row_sums(const ScoreTask& task, int64_t split, int64_t splits, int64_t first_row,
                            float (&sum)[kHeld], float (&second)[kHeld], float (&largest)[kHeld],
                            const Over& over) {
  const auto in_batch = [&](int row) { return first_row + row < task.batch; };
  if constexpr (kLargestOnly) {
    over(
        sum, [](float a, float b) { return a > b ? a : b; },
        [&](int row, float value) {
          if (in_batch(row)) task.largest[split * task.batch + first_row + row] = value;
        });
  } else {
    const SweepSums& sums = task.sums;
    const auto add = [](float a, float b) { return a + b; };
    over(sum, add, [&](int row, float value) {
      if (in_batch(row)) sums.value(split, first_row + row) = value;
    });
    over(second, add, [&](int row, float value) {
      if (in_batch(row)) sums.second(split, splits, first_row + row) = value;
    });
    if constexpr (kLargest)
      over(
          largest, [](float a, float b) { return math::larger(a, b); },
          [&](int row, float value) {
            if (in_batch(row)) sums.largest_cosine(split, splits, first_row + row) = value;
          });
  }
}

}  // namespace
}  // namespace nf
