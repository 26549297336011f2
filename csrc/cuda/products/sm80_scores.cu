// Scores x_hat w_hat^T on tensor cores (mma.sync, compute capability 8.0), and what a term makes of them.
//
// A block owns kTile rows of x_hat, which stay in shared memory, and walks over some tiles of classes. w_hat
// streams through kStages buffers of kBlock columns, fetched by asynchronous copies that run ahead across tile
// borders. A finished tile is turned into coefficients in registers, summed there, and leaves in accesses of 16
// bytes without a detour (mma_tile.cuh: dealt_row). Registers are held down so that two blocks share a
// multiprocessor: while one takes exponentials the other multiplies; so what rows say to their terms, and the
// numbers common to all of them, lie in shared memory. Rows and classes beyond the edge are zero, and left out of
// sums and stores.
//
// The softmax's kernels have run on GPUs. Those of the other terms, and all that find the largest cosines, have
// only been compiled and emulated so far.
#include <device/arrival.cuh>
#include <device/vector.cuh>

#include "cuda/device/power_exp.cuh"
#include "cuda/products/score_sums.cuh"
#include "cuda/products/sm80_score_tile.cuh"
#include "cuda/products/sm80_scores.h"
#include "math/softmax.h"

namespace nf {
namespace {

// Blocks that share a multiprocessor. With the largest cosines the six numbers of a term (hard negatives, sigmoids
// of angles) leave no register to the second.
template <class S, class Term, bool kLargest>
constexpr int kResident =
    S::kAcross == 2 && !(kLargest && Term::kNumbers == tiles::Sm80Scores::kMostNumbers) ? 2 : 1;

// kLargestOnly: the first of two passes, for scales outside the fixed shift's window. kPerRow: the scale is a
// row's own. kLargest: the largest cosine as well.
template <class S, class Term, bool kLargestOnly, bool kPerRow, bool kLargest>
NF_KERNEL_RESIDENT(S::kThreads, (kResident<S, Term, kLargest>))
score_kernel(ScoreTask task, int64_t tiles_per_block) {
  const double s = kPerRow ? 0.0 : task.rows.scale.at(0);
  if (kLargestOnly && !kPerRow && task.window.serves(s)) return;

  SharedMemory shared;
  const int x_stride = padded_columns(task.dim), steps = x_stride / kBlock;
  Half* x = shared.take<Half>(kTile * x_stride);
  Half* w = shared.take<Half>(kStages * S::kClasses * kBlock);
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
                all_tiles = (task.width + S::kClasses - 1) / S::kClasses;
  const int64_t end_tile =
      first_tile + tiles_per_block < all_tiles ? first_tile + tiles_per_block : all_tiles;

  // The fetches run kStages - 1 steps ahead; where they are is counted, not divided out of the step.
  int64_t fetch_class = first_tile * S::kClasses;
  int fetch_depth = 0, fetch_stage = 0;
  const auto fetch = [&] {
    if (fetch_class < end_tile * S::kClasses)
      fetch_block<S::kClasses, kBlock, S::kThreads>(
          task.w_hat, fetch_class, task.width, fetch_depth, task.dim, task.dim,
          w + fetch_stage * S::kClasses * kBlock, kBlock, KeyDealt());
    copy_async_commit();  // also when empty: a wait counts groups
    fetch_stage = (fetch_stage + 1) % kStages;
    fetch_depth += kBlock;
    if (fetch_depth == x_stride) fetch_depth = 0, fetch_class += S::kClasses;
  };

  float sum[kHeldRows], second[kHeldRows], largest[kHeldRows];
#pragma unroll
  for (int r = 0; r < kHeldRows; ++r) {
    sum[r] = kLargestOnly ? -INFINITY : 0.0f;
    second[r] = 0.0f;
    largest[r] = -INFINITY;
  }
  constexpr double kUnit = kLargestOnly ? 1.0 : math::kLog2E;  // the largest logits are plain ones
  if (thread_id() < kTile) {                                   // visible after the first step's barrier
    const int64_t i = first_row + thread_id();
    const bool exists = i < task.batch;
    target[thread_id()] = exists ? int(target_place(task.rows.labels[i], task.first, task.width)) : -1;
    if constexpr (Term::kSoftmax) shifts[thread_id()] = exists ? float(task.rows.shift[i] * kUnit) : 0.0f;
    if constexpr (Term::kThreshold) thresholds[thread_id()] = exists ? float(task.rows.threshold[i]) : 0.0f;
    if constexpr (kPerRow) scales[thread_id()] = exists ? float(task.rows.scale.at(i) * kUnit) : 0.0f;
  }
  if (thread_id() < Term::kNumbers) numbers[thread_id()] = float(task.rows.numbers[thread_id()]);
  const float common_scale = float(s * kUnit);

  for (int depth = 0; depth < x_stride; depth += kBlock)  // lands with the first stage
    fetch_block<kTile, kBlock, S::kThreads>(task.x_hat, first_row, task.batch, depth, task.dim, task.dim,
                                            x + depth, x_stride, KeyInOrder());
  for (int stage = 0; stage < kStages - 1; ++stage) fetch();

  int stage = 0;
  for (int64_t tile_first = first_tile * S::kClasses; tile_first < end_tile * S::kClasses;
       tile_first += S::kClasses) {
    float acc[kRowSteps][kGroups][4][4] = {};
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<kStages - 2>();
      sync_block();  // this step's copies, made by all threads, before its reads; and the last step's
                     // reads before the fetch below overwrites their stage
      fetch();
      multiply_stage<S>(x + step * kBlock, x_stride, w + stage * S::kClasses * kBlock, acc);
      stage = (stage + 1) % kStages;
    }

#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      const int row = held_row<S>(r);
      const math::TermRow<float> of_row{kPerRow ? scales[row] : common_scale,
                                        Term::kSoftmax ? shifts[row] : 0.0f,
                                        Term::kThreshold ? thresholds[row] : 0.0f};
      const Term term(of_row, numbers);
      float part = 0, part_second = 0;  // of this tile
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        // Of this lane's eight classes here: how many exist, and which of them is the target.
        const int64_t first = tile_first + held_column<S>() + n * 32;
        const int64_t exist = task.width - first;
        const int own = target[row] - int(first);
        Vector<BFloat16, kChunk> stored;
        const auto fold = [&]<bool kSome>() {  // kSome: not all of them count
#pragma unroll
          for (int k = 0; k < kChunk; ++k) {
            const float cosine = acc[r / 2][n][k / 2][r % 2 * 2 + k % 2];
            const bool counts = !kSome || (k < exist && k != own);
            if constexpr (kLargestOnly) {
              const float logit = of_row.scale * term.logit(cosine);
              sum[r] = counts && logit > sum[r] ? logit : sum[r];
            } else {
              if constexpr (kLargest)
                if (counts) largest[r] = math::larger(largest[r], cosine);
              math::Cell<float> cell = term.at(cosine, PowerExp());
              if (!counts) cell = {};
              part += cell.value;
              part_second += cell.second;
              stored.at[k] = BFloat16(cell.coefficient);
            }
          }
        };
        if (exist < kChunk || unsigned(own) < kChunk)
          fold.template operator()<true>();
        else
          fold.template operator()<false>();
        // Rows of E are padded to a multiple of kChunk, so a chunk that begins inside fits.
        if (!kLargestOnly && task.e != nullptr && exist > 0 && first_row + row < task.batch)
          store_vector_global<kChunk>(task.e + (first_row + row) * task.stride + first, stored);
      }
      if constexpr (!kLargestOnly) {
        sum[r] += part;
        second[r] += part_second;
      }
    }
  }
  copy_async_wait<0>();  // no copy may be under way when its stage becomes scratch, or the block ends

  const auto over = [&](float (&mine)[kHeldRows], const auto& combine, const auto& put) {
    over_row<kTile, S::kAcross>(WholeBlock(), warp_id() % S::kAcross, held_row<S>, mine,
                                reinterpret_cast<float*>(w), combine, put);
  };
  if (kLargestOnly || task.sums.partial != nullptr)
    put_row_sums<kLargestOnly, kLargest>(task, split, splits, first_row, sum, second, largest, over);
  if constexpr (!kLargestOnly) {
    const SweepSums& sums = task.sums;
    if (sums.partial == nullptr) return;
    if (!last_to_arrive(sums.arrivals + block_id() % row_blocks, unsigned(splits))) return;
    const int64_t end_row = first_row + kTile < task.batch ? first_row + kTile : task.batch;
    sums.template add<kLargest>(splits, first_row, end_row, reinterpret_cast<double*>(w));
  }
}

// f.template operator()<S>() with the shape for these columns on this device.
template <class F>
auto dispatch_shape(const Queue& queue, int64_t dim, const F& f) {
  return tiles::Sm80Scores::across(dim, queue.shared_limit()) == 4 ? f.template operator()<Shape<4>>()
                                                                   : f.template operator()<Shape<2>>();
}

int64_t tiles_per_block(const Queue& queue, int64_t batch, int64_t dim, int64_t width) {
  return dispatch_shape(queue, dim, [&]<class S>() {
    return tiles::Sm80Scores::tiles_per_block(S::kAcross, queue.multiprocessors(), batch, width);
  });
}

template <bool kLargestOnly, class Term>
void run(Queue& queue, const ScoreTask& task) {
  static_assert(numbers_per_row<Term>(Term::kSoftmax) <= tiles::Sm80Scores::kMostPerRow &&
                    Term::kNumbers <= tiles::Sm80Scores::kMostNumbers,
                "a term says more than engine/tiles.h has shared memory for");
  STD_TORCH_CHECK(task.width <= INT32_MAX - 256,
                  "sm80_scores: expected at most 2^31 - 257 classes at once, got ",
                  task.width);  // a lane counts them in 32 bits
  const int64_t per_block = tiles_per_block(queue, task.batch, task.dim, task.width);
  const Grid grid{tiles::Sm80Scores::row_blocks(task.batch) *
                  score_splits(queue, task.batch, task.dim, task.width)};
  dispatch_shape(queue, task.dim, [&]<class S>() {
    const auto with = [&]<bool kPerRow>() {
      const int64_t shared =
          tiles::Sm80Scores::shared(S::kAcross, task.dim, numbers_per_row<Term>(kPerRow), Term::kNumbers);
      launch(kLargestOnly ? "score_largest" : "score_fold", queue,
             !kLargestOnly && task.sums.largest ? score_kernel<S, Term, kLargestOnly, kPerRow, !kLargestOnly>
                                                : score_kernel<S, Term, kLargestOnly, kPerRow, false>,
             grid, S::kThreads, size_t(shared), task, per_block);
    };
    if constexpr (Term::kSoftmax)  // the others have no scale
      if (task.rows.scale.per_row) return with.template operator()<true>();
    with.template operator()<false>();
  });
}

}  // namespace

int64_t score_splits(const Queue& queue, int64_t batch, int64_t dim, int64_t width) {
  return dispatch_shape(queue, dim, [&]<class S>() {
    const int64_t classes = tiles_per_block(queue, batch, dim, width) * S::kClasses;
    return (width + classes - 1) / classes;
  });
}

void score_largest(Queue& queue, const ScoreTask& task) {
  dispatch_term<float>(task.rows.term, [&]<class Term>() {
    if constexpr (Term::kSoftmax) run<true, Term>(queue, task);
  });
}

void score_fold(Queue& queue, const ScoreTask& task) {
  dispatch_term<float>(task.rows.term, [&]<class Term>() { run<false, Term>(queue, task); });
}

}  // namespace nf
