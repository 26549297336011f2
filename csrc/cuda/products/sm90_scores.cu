// Scores x_hat w_hat^T on Hopper's tensor cores (wgmma, built as sm_90a), and what a term makes of them.
//
// A block owns kTile rows of x_hat, which stay in shared memory, and walks over some tiles of classes. One warpgroup,
// the producer, fetches: x_hat once, w_hat in boxes of 64 columns through a ring of stages that knows no tiles. Two
// others, the consumers, take the tiles in turn, so that one makes coefficients while the other multiplies. A consumer
// turns to the ring when the other's last box has come: a phase of a stage can be told from the one before it, not from
// the one before that. A consumer's warp puts 16 rows x 64
// classes of E into a box of its own, from which a bulk copy takes them to memory. Rows and classes beyond the edge are
// zero, and left out of sums and stores.
//
// It has been compiled and emulated, and never run on a GPU.
#include <device/arrival.cuh>
#include <device/tensor_map.cuh>
#include <device/vector.cuh>

#include "cuda/device/power_exp.cuh"
#include "cuda/products/score_sums.cuh"
#include "cuda/products/sm90_score_tile.cuh"
#include "cuda/products/sm90_scores.h"
#include "math/softmax.h"

namespace nf {
namespace {

// Registers of a producer's and of a consumer's thread: 128 of those and 256 of these have 64,512 of 65,536.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// Sigmoids are so long that a second way through them, for cells that all count, would be dearer to fetch than what it
// leaves out.
template <class Term>
constexpr bool kOneWay = !Term::kSoftmax && Term::kNumbers > 0;

// kLargestOnly: the first of two passes, for scales outside the fixed shift's window. kPerRow: the scale is a
// row's own. kLargest: the largest cosine as well.
template <class Term, bool kLargestOnly, bool kPerRow, bool kLargest>
NF_KERNEL_RESIDENT(kThreads, 1)
sm90_score_kernel(NF_TENSOR_MAP x_map, NF_TENSOR_MAP w_map, NF_TENSOR_MAP e_map, ScoreTask task,
                  int64_t tiles_per_block) {
  const double s = kPerRow ? 0.0 : task.rows.scale.at(0);
  if (kLargestOnly && !kPerRow && task.window.serves(s)) return;

  SharedMemory shared;
  const int steps = int(tiles::padded_columns(task.dim)) / kBlock;
  Half* x = shared.take_boxes<Half>(steps * kBox);
  Half* w = shared.take_boxes<Half>(kStages * kBox);
  BFloat16* e = shared.take_boxes<BFloat16>(Tiles::kConsumers * 4 * Tiles::kStore);
  Barrier* barriers = shared.take<Barrier>(Tiles::kBarriers);
  const Pipeline pipeline{barriers + 2 * kStages, barriers, barriers + kStages};
  unsigned* told = shared.take<unsigned>(1);
  // Of each row the target's place among the classes, and its TermRow as far as the term reads it. Registers are
  // dearer than these reads.
  int* target = shared.take<int>(kTile);
  float* shifts = Term::kSoftmax ? shared.take<float>(kTile) : nullptr;
  float* thresholds = Term::kThreshold ? shared.take<float>(kTile) : nullptr;
  float* scales = kPerRow ? shared.take<float>(kTile) : nullptr;
  float* numbers = Term::kNumbers > 0 ? shared.take<float>(Term::kNumbers) : nullptr;

  const int64_t row_blocks = (task.batch + kTile - 1) / kTile, splits = block_count() / row_blocks;
  // Neighbouring blocks share their classes, which then come from the L2 cache.
  const int64_t first_row = block_id() % row_blocks * kTile, split = block_id() / row_blocks;
  const int64_t first_tile = split * tiles_per_block,
                all_tiles = (task.width + Tiles::kClasses - 1) / Tiles::kClasses;
  const int64_t end_tile =
      first_tile + tiles_per_block < all_tiles ? first_tile + tiles_per_block : all_tiles;

  const bool stores = !kLargestOnly && task.e != nullptr;
  if (thread_id() == 0) {
    prefetch_map(x_map);
    prefetch_map(w_map);
    if (stores) prefetch_map(e_map);
    for (int k = 0; k < Tiles::kBarriers; ++k) barrier_init(barriers + k, 1);
    fence_barriers();
  }
  sync_block();  // the barriers, before anybody waits

  if (warpgroup_id() == 0) {
    registers_down<kProducerRegisters>();
    if (thread_id() == 0) {
      RingPlace<kStages> at(1);
      for (int64_t tile = first_tile; tile < end_tile; ++tile)
        for (int step = 0; step < steps; ++step) {
          if (tile == first_tile) {
            barrier_arrive_expect(pipeline.x + step, kBoxLoad);
            load_box(x + step * kBox, x_map, first_row, step * kBlock, pipeline.x + step);
          }
          barrier_wait(pipeline.empty + at.stage, at.parity);
          barrier_arrive_expect(pipeline.full + at.stage, kBoxLoad);
          load_box(w + at.stage * kBox, w_map, tile * Tiles::kClasses, step * kBlock,
                   pipeline.full + at.stage);
          at.advance();
        }
    }
  } else {
    registers_up<kConsumerRegisters>();
    const Consumers team;
    constexpr double kUnit = kLargestOnly ? 1.0 : math::kLog2E;  // the largest logits are plain ones
    if (team.me() < kTile) {
      const int64_t i = first_row + team.me();
      const bool exists = i < task.batch;
      target[team.me()] = exists ? int(target_place(task.rows.labels[i], task.first, task.width)) : -1;
      if constexpr (Term::kSoftmax) shifts[team.me()] = exists ? float(task.rows.shift[i] * kUnit) : 0.0f;
      if constexpr (Term::kThreshold) thresholds[team.me()] = exists ? float(task.rows.threshold[i]) : 0.0f;
      if constexpr (kPerRow) scales[team.me()] = exists ? float(task.rows.scale.at(i) * kUnit) : 0.0f;
    }
    if (team.me() < Term::kNumbers) numbers[team.me()] = float(task.rows.numbers[team.me()]);
    team.sync();  // what the rows say, before it is read
    const float common_scale = float(s * kUnit);

    float sum[kHeldRows], second[kHeldRows], largest[kHeldRows];
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      sum[r] = kLargestOnly ? -INFINITY : 0.0f;
      second[r] = 0.0f;
      largest[r] = -INFINITY;
    }

    const int me = team.me() / kWarpgroup, pair = 2 * (lane_id() % 4), key = lane_id() / 4;
    BFloat16* box = e + team.me() / kWarp * Tiles::kStore;  // this warp's
    RingPlace<kStages> at(0);
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      if ((tile - first_tile) % Tiles::kConsumers != me) {  // the other consumer's stages
        for (int step = 0; step < steps; ++step) at.advance();
        continue;
      }
      // All boxes of the tile before have come, before this one's are waited for.
      if (tile > first_tile) sync_threads(kTurns + me, Consumers::kCount);
      float acc[kHalves][kRegisters];
      static_assert(Tiles::kConsumers == 2, "the next turn is the other consumer's");
      const auto next_turn = [&] {
        if (tile + 1 < end_tile) arrive_threads(kTurns + 1 - me, Consumers::kCount);
      };
      multiply_tile(x, w, pipeline, steps, tile - first_tile == me, next_turn, at, acc);

      const int64_t tile_class = tile * Tiles::kClasses;
      const int exist =
          int(task.width - tile_class < Tiles::kClasses ? task.width - tile_class : int64_t(Tiles::kClasses));
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        float part[2] = {}, part_second[2] = {};  // of this tile
#pragma unroll
        for (int column = 0; column < Tiles::kClasses; column += kBlock) {
          Vector<BFloat16, 2> stored[2][kPairs];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int r = 2 * half + h, row = held_row(r);
            const math::TermRow<float> of_row{kPerRow ? scales[row] : common_scale,
                                              Term::kSoftmax ? shifts[row] : 0.0f,
                                              Term::kThreshold ? thresholds[row] : 0.0f};
            const Term term(of_row, numbers);
            // Of this lane's classes here: how many exist, and which of them is the target.
            const int here = exist - column - pair, own = target[row] - int(tile_class) - column - pair;
            const auto fold = [&]<bool kSome>() {  // kSome: not all of them count
#pragma unroll
              for (int k = 0; k < 2 * kPairs; ++k) {
                const int place = k / 2 * 8 + k % 2;
                const float cosine = acc[half][(column / 8 + k / 2) * 4 + 2 * h + k % 2];
                const bool counts = !kSome || (place < here && place != own);
                if constexpr (kLargestOnly) {
                  const float logit = of_row.scale * term.logit(cosine);
                  sum[r] = counts && logit > sum[r] ? logit : sum[r];
                } else {
                  if constexpr (kLargest)
                    if (counts) largest[r] = math::larger(largest[r], cosine);
                  math::Cell<float> cell = term.at(cosine, PowerExp());
                  if (!counts) cell = {};
                  part[h] += cell.value;
                  part_second[h] += cell.second;
                  stored[h][k / 2].at[k % 2] = BFloat16(cell.coefficient);
                }
              }
            };
            if (kOneWay<Term> || warp_any(here < kBlock - pair || unsigned(own + pair) < kBlock))
              fold.template operator()<true>();
            else
              fold.template operator()<false>();
          }
          if (!stores) continue;
          if (lane_id() == 0) wait_stores_read<0>();
          sync_warp();  // the copy's reads of the box, before these writes
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int j = 0; j < kPairs; ++j)
              store_vector(box + (8 * h + key) * kBlock + (j ^ key) * 8 + pair, stored[h][j]);
          fence_shared_for_bulk();
          sync_warp();  // all lanes' writes, before the copy reads them
          const int64_t row = first_row + half * kHalfRows + warp_id() % 4 * Tiles::kStoreRows;
          if (lane_id() == 0 && column < exist && row < task.batch) {
            store_box(e_map, row, tile_class + column, box);
            commit_stores();
          }
        }
        if constexpr (!kLargestOnly) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            sum[2 * half + h] += part[h];
            second[2 * half + h] += part_second[h];
          }
        }
      }
    }

    const auto over = [&](float (&mine)[kHeldRows], const auto& combine, const auto& put) {
      over_row<kTile, Tiles::kConsumers>(team, me, held_row, mine, reinterpret_cast<float*>(w), combine, put);
    };
    if (kLargestOnly || task.sums.partial != nullptr)
      put_row_sums<kLargestOnly, kLargest>(task, split, splits, first_row, sum, second, largest, over);
    if constexpr (!kLargestOnly) {
      const SweepSums& sums = task.sums;
      if (sums.partial != nullptr &&
          last_to_arrive(sums.arrivals + block_id() % row_blocks, unsigned(splits), team, told)) {
        const int64_t end_row = first_row + kTile < task.batch ? first_row + kTile : task.batch;
        sums.template add<kLargest>(splits, first_row, end_row, reinterpret_cast<double*>(w), team);
      }
    }
    if (stores && lane_id() == 0) wait_stores<0>();  // the block's shared memory is the next one's
  }
  barriers_held();
}

int64_t tiles_per_block(const Queue& queue, int64_t batch, int64_t width) {
  return Tiles::tiles_per_block(queue.multiprocessors(), batch, width);
}

template <bool kLargestOnly, class Term>
void run(Queue& queue, const ScoreTask& task) {
  static_assert(
      numbers_per_row<Term>(Term::kSoftmax) <= Tiles::kMostPerRow && Term::kNumbers <= Tiles::kMostNumbers,
      "a term says more than engine/tiles_sm90.h has shared memory for");
  STD_TORCH_CHECK(task.width <= INT32_MAX - 256,
                  "sm90_scores: expected at most 2^31 - 257 classes at once, got ",
                  task.width);  // a lane counts them in 32 bits
  if (task.batch == 0 || task.width == 0) return;
  const TensorMap x = tensor_map("x_hat", task.x_hat, ScalarType::Half, task.batch, task.dim, task.dim,
                                 kTile),
                  w = tensor_map("w_hat", task.w_hat, ScalarType::Half, task.width, task.dim, task.dim,
                                 Tiles::kClasses);
  const TensorMap e = task.e == nullptr ? TensorMap{}
                                        : tensor_map("E", task.e, ScalarType::BFloat16, task.batch,
                                                     task.stride, task.stride, Tiles::kStoreRows);
  const Grid grid{Tiles::row_blocks(task.batch) * sm90_score_splits(queue, task.batch, task.width)};
  const auto with = [&]<bool kPerRow>() {
    const int64_t shared = Tiles::shared(task.dim, numbers_per_row<Term>(kPerRow), Term::kNumbers);
    launch(kLargestOnly ? "sm90_score_largest" : "sm90_score_fold", queue,
           !kLargestOnly && task.sums.largest ? sm90_score_kernel<Term, kLargestOnly, kPerRow, !kLargestOnly>
                                              : sm90_score_kernel<Term, kLargestOnly, kPerRow, false>,
           grid, kThreads, size_t(shared), x, w, e, task, tiles_per_block(queue, task.batch, task.width));
  };
  if constexpr (Term::kSoftmax)  // the others have no scale
    if (task.rows.scale.per_row) return with.template operator()<true>();
  with.template operator()<false>();
}

}  // namespace

int64_t sm90_score_splits(const Queue& queue, int64_t batch, int64_t width) {
  const int64_t classes = tiles_per_block(queue, batch, width) * Tiles::kClasses;
  return (width + classes - 1) / classes;
}

void sm90_score_largest(Queue& queue, const ScoreTask& task) {
  dispatch_term<float>(task.rows.term, [&]<class Term>() {
    if constexpr (Term::kSoftmax) run<true, Term>(queue, task);
  });
}

void sm90_score_fold(Queue& queue, const ScoreTask& task) {
  dispatch_term<float>(task.rows.term, [&]<class Term>() { run<false, Term>(queue, task); });
}

}  // namespace nf
