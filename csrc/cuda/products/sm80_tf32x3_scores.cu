// Scores x_hat w_hat^T of float32 on tensor cores (mma.sync, compute capability 8.0), three products of tf32 for one
// (tf32x3.cuh), and what a term makes of them.
//
// A block owns kRows rows of x_hat and walks over some tiles of classes. Both factors stream through kStages buffers
// of kDepth columns, fetched by asynchronous copies that run ahead across tile borders, and are split in registers:
// 48 values for 96 products of a warp, less than half of the instructions that the products leave room for. A
// finished tile is turned into coefficients in registers and leaves in accesses of 16 bytes; its sums are added in
// double, by the lane that owns them. Rows and classes beyond the edge are zero, and left out of sums and stores.
//
// These kernels have only been compiled and emulated so far.
#include <device/arrival.cuh>
#include <device/shared_memory.cuh>
#include <device/warp.cuh>

#include "cuda/device/mma_tile.cuh"
#include "cuda/device/tf32x3.cuh"
#include "cuda/products/sm80_tf32x3.h"

namespace nf {
namespace {

using S = tiles::Sm80Tf32Scores;

constexpr int kRowSteps = S::kWarpRows / 16, kHeldRows = 2 * kRowSteps;  // rows a lane has a part of
constexpr int kGroups = S::kWarpClasses / 16;                            // of 16 dealt classes
constexpr int kSteps = 2;  // of 8 columns, summed on tensor cores

// mma_tile.cuh's dealt_row for chunks of four: 16 rows are dealt out to the columns of two steps, and
// lane % 4 = t holds rows 4t … 4t + 3 in order.
NF_DEVICE int dealt_row_of_16(int step, int i) { return i / 2 * 4 + step * 2 + i % 2; }
struct KeyDealtOf16 {
  NF_DEVICE int operator()(int row) const { return row / 4 % 4 * 2 + row % 2; }
};

using Sums = float[kGroups][2][kRowSteps][4];

// sum += x w^T for this warp's part of the tile, over kDepth columns.
NF_DEVICE void multiply_stage(const float* x, const float* w, Sums& sum) {
  const int matrix = lane_id() / 8, i = lane_id() % 8;  // which of the four an ldmatrix reads, its row
  const float* x_rows = x + (warp_id() / S::kAcross * S::kWarpRows + matrix % 2 * 8 + i) * S::kDepth;
  const float* w_rows = w + (warp_id() % S::kAcross * S::kWarpClasses + dealt_row_of_16(0, i)) * S::kDepth;
  const int x_chunk = swizzled<float>(matrix / 2 * 4, i), w_chunk = swizzled<float>(matrix * 4, i);
#pragma unroll 1
  for (int k = 0; k < S::kDepth; k += 8 * kSteps) {
    Tf32Left a[kRowSteps][kSteps];
#pragma unroll
    for (int m = 0; m < kRowSteps; ++m)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t words[4];
        load_matrix_x4(words, x_rows + m * 16 * S::kDepth + (x_chunk ^ (k + 8 * step)));
#pragma unroll
        for (int r = 0; r < 4; ++r) a[m][step].split_word(r, words[r]);
      }
#pragma unroll
    for (int q = 0; q < kGroups; ++q)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t words[4];
        load_matrix_x4(words, w_rows + (q * 16 + dealt_row_of_16(j, 0)) * S::kDepth + (w_chunk ^ k));
        Tf32Right b[kSteps];
#pragma unroll
        for (int r = 0; r < 4; ++r) b[r / 2].split_word(r % 2, words[r]);
        multiply_tf32x3(a, b, sum[q][j]);
      }
  }
}

// kLargestOnly: the first of two passes, for scales outside the fixed shift's window. kLargest: the largest cosine
// as well.
template <class Term, bool kLargestOnly, bool kLargest>
NF_KERNEL_RESIDENT(S::kThreads, S::kResident)
tf32_score_kernel(Tf32Scores task, int64_t tiles_per_block) {
  if (kLargestOnly && !task.rows.scale.per_row && task.window.serves(task.rows.scale.at(0))) return;

  SharedMemory shared;
  float* stages = shared.take<float>(S::kStages * S::kStage);
  // Two sums and the largest cosine, or the largest logit: [3, kAcross, kRows], each a lane's own while it adds.
  double* sums = shared.take<double>(S::kSums);
  float* of_rows = shared.take<float>(3 * S::kRows);  // TermRow's numbers
  int* target = shared.take<int>(S::kRows);           // the target's place among the classes
  float* numbers = Term::kNumbers > 0 ? shared.take<float>(Term::kNumbers) : nullptr;

  const int64_t row_blocks = S::row_blocks(task.batch), splits = block_count() / row_blocks;
  // Neighbouring blocks share their classes, which then come from the L2 cache.
  const int64_t row_block = block_id() % row_blocks, split = block_id() / row_blocks;
  const int64_t first_row = row_block * S::kRows;
  const int dim = int(task.dim), first_class = int(split * tiles_per_block) * S::kClasses,
            width = int(task.width),
            end_class = int(tiles_per_block * S::kClasses < width - first_class
                                ? first_class + tiles_per_block * S::kClasses
                                : width);

  int fetch_class = first_class, fetch_depth = 0;
  const auto fetch = [&](int stage) {
    if (fetch_class < end_class) {
      float* x = stages + stage * S::kStage;
      fetch_block<S::kRows, S::kDepth, S::kThreads>(task.x_hat, first_row, task.batch, fetch_depth, dim, dim,
                                                    x, S::kDepth, KeyInOrder());
      fetch_block<S::kClasses, S::kDepth, S::kThreads>(task.w_hat, fetch_class, width, fetch_depth, dim, dim,
                                                       x + S::kRows * S::kDepth, S::kDepth, KeyDealtOf16());
    }
    copy_async_commit();  // also when empty: a wait counts groups
    fetch_depth += S::kDepth;
    if (fetch_depth >= dim) fetch_depth = 0, fetch_class += S::kClasses;
  };

  const int across = warp_id() % S::kAcross;
  const int held_row = warp_id() / S::kAcross * S::kWarpRows + lane_id() / 4;  // + 8 r
  const int held_class = across * S::kWarpClasses + lane_id() % 4 * 4;         // + 16 q + {0 … 3}
  const bool owns_sums = lane_id() % 4 == 0;
  const auto sum_of = [&](int which, int row) -> double& {
    return sums[(which * S::kAcross + across) * S::kRows + row];
  };
  if (owns_sums)
    for (int r = 0; r < kHeldRows; ++r) {
      sum_of(0, held_row + 8 * r) = kLargestOnly ? -INFINITY : 0.0;
      sum_of(1, held_row + 8 * r) = 0.0;
      sum_of(2, held_row + 8 * r) = -INFINITY;
    }
  if (thread_id() < S::kRows) {
    const int64_t i = first_row + thread_id();
    const bool exists = i < task.batch;
    const auto of_row = exists ? task.rows.at<float>(i) : math::TermRow<float>{};
    of_rows[thread_id()] = of_row.scale;
    of_rows[S::kRows + thread_id()] = of_row.shift;
    of_rows[2 * S::kRows + thread_id()] = of_row.threshold;
    target[thread_id()] = exists ? int(target_place(task.rows.labels[i], task.first, task.width)) : -1;
  }
  if (thread_id() < Term::kNumbers) numbers[thread_id()] = float(task.rows.numbers[thread_id()]);

  fetch(0);
  sync_block();  // what is known of the rows, before it is read
  int stage = 0;
  for (int tile_first = first_class; tile_first < end_class; tile_first += S::kClasses) {
    Sums product = {};
    for (int depth = 0; depth < dim; depth += S::kDepth) {
      copy_async_wait<0>();
      sync_block();  // this stage's copies, made by all threads, before its reads; and the last stage's reads
                     // before the fetch below overwrites it
      fetch(stage ^ 1);
      const float* x = stages + stage * S::kStage;
      multiply_stage(x, x + S::kRows * S::kDepth, product);
      stage ^= 1;
    }

#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      const int row = held_row + 8 * r;
      const math::TermRow<float> of_row{of_rows[row], of_rows[S::kRows + row], of_rows[2 * S::kRows + row]};
      const Term term(of_row, numbers);
      const int own_of_row = target[row] - tile_first - held_class;
      float* e = task.e + (first_row + row) * task.stride + tile_first + held_class;
      float value = 0, second = 0, largest = -INFINITY;
#pragma unroll
      for (int q = 0; q < kGroups; ++q) {
        const int exist = width - tile_first - held_class - 16 * q, own = own_of_row - 16 * q;
        Vector<float, 4> stored;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float cosine = product[q][k / 2][r / 2][r % 2 * 2 + k % 2];
          const bool counts = k < exist && k != own;
          if constexpr (kLargestOnly) {
            const float logit = of_row.scale * term.logit(cosine);
            if (counts && logit > largest) largest = logit;
          } else {
            if constexpr (kLargest)
              if (counts) largest = math::larger(largest, cosine);
            math::Cell<float> cell = term.at(cosine, math::PlainExp());
            if (!counts) cell = {};
            value += cell.value;
            second += cell.second;
            stored.at[k] = cell.coefficient;
          }
        }
        // Up to the padding's end, in zeros: the product of dW fetches it.
        if (!kLargestOnly && task.e != nullptr && exist > width - int(task.stride) &&
            first_row + row < task.batch)
          store_vector_global<4>(e + 16 * q, stored);
      }
      if constexpr (kLargestOnly || kLargest) {
        largest = math::larger(largest, shuffle_xor(largest, 1));
        largest = math::larger(largest, shuffle_xor(largest, 2));
        double& known = sum_of(kLargestOnly ? 0 : 2, row);
        if (owns_sums) known = math::larger(known, double(largest));
      }
      if constexpr (!kLargestOnly) {
        value += shuffle_xor(value, 1);
        value += shuffle_xor(value, 2);
        second += shuffle_xor(second, 1);
        second += shuffle_xor(second, 2);
        if (owns_sums) sum_of(0, row) += value, sum_of(1, row) += second;
      }
    }
  }
  copy_async_wait<0>();  // no copy may be under way when its stage becomes scratch, or the block ends
  if (!kLargestOnly && task.sums.partial == nullptr) return;

  sync_block();  // the lanes' sums, before the rows' are made of them
  const int64_t i = first_row + thread_id();
  const bool mine = thread_id() < S::kRows && i < task.batch;
  const auto both = [&](int which) -> const double* {
    return sums + which * S::kAcross * S::kRows + thread_id();
  };
  static_assert(S::kAcross == 2);
  if constexpr (kLargestOnly) {
    if (mine) task.largest[split * task.batch + i] = float(math::larger(both(0)[0], both(0)[S::kRows]));
  } else {
    if (mine) {
      task.sums.value(split, i) = both(0)[0] + both(0)[S::kRows];
      task.sums.second(split, splits, i) = both(1)[0] + both(1)[S::kRows];
      if constexpr (kLargest)
        task.sums.largest_cosine(split, splits, i) = math::larger(both(2)[0], both(2)[S::kRows]);
    }
    if (!last_to_arrive(task.sums.arrivals + row_block, unsigned(splits))) return;
    const int64_t end_row = first_row + S::kRows < task.batch ? first_row + S::kRows : task.batch;
    task.sums.add<kLargest>(splits, first_row, end_row, reinterpret_cast<double*>(stages));
  }
}

template <bool kLargestOnly, class Term>
void run(Queue& queue, const Tf32Scores& task) {
  static_assert(Term::kNumbers <= tiles::Sm80Scores::kMostNumbers);
  STD_TORCH_CHECK(
      task.dim % 4 == 0 && task.width <= INT32_MAX - S::kClasses,
      "sm80_tf32x3: expected a multiple of 4 columns and at most 2^31 - 129 classes at once, got ", task.dim,
      " and ", task.width);  // a lane counts classes in 32 bits
  const int64_t per_block = S::tiles_per_block(queue.multiprocessors(), task.batch, task.width);
  const Grid grid{S::row_blocks(task.batch) * tf32_score_splits(queue, task.batch, task.width)};
  launch(kLargestOnly ? "tf32_score_largest" : "tf32_score_fold", queue,
         !kLargestOnly && task.sums.largest ? tf32_score_kernel<Term, kLargestOnly, !kLargestOnly>
                                            : tf32_score_kernel<Term, kLargestOnly, false>,
         grid, S::kThreads, size_t(S::shared()), task, per_block);
}

}  // namespace

int64_t tf32_score_splits(const Queue& queue, int64_t batch, int64_t width) {
  const int64_t classes = S::tiles_per_block(queue.multiprocessors(), batch, width) * S::kClasses;
  return (width + classes - 1) / classes;
}

void tf32_score_largest(Queue& queue, const Tf32Scores& task) {
  dispatch_term<float>(task.rows.term, [&]<class Term>() {
    if constexpr (Term::kSoftmax) run<true, Term>(queue, task);
  });
}

void tf32_score_fold(Queue& queue, const Tf32Scores& task) {
  dispatch_term<float>(task.rows.term, [&]<class Term>() { run<false, Term>(queue, task); });
}

}  // namespace nf
