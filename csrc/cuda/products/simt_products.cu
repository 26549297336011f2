// Products by multiply-adds of single threads. A thread holds of its warp's tile what it would hold of a
// product on tensor cores, so that both kinds end alike (class_gradient.cuh). Stages of shared memory are
// filled by asynchronous copies.
#include <device/arrival.cuh>
#include <device/shared_memory.cuh>

#include "cuda/device/mma_tile.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/products/simt_products.h"

namespace nf {
namespace {

template <class T>
constexpr int kRounds = tiles::kSimtRounds<sizeof(T)>;

// For rows 4 t + {0 … 3}, t < 4, of which a warp reads four at a time, four apart.
struct KeyByFour {
  NF_DEVICE int operator()(int row) const { return row / 4 % 8; }
};

// Scores: eight warps, four along the rows and two along the classes; a thread has rows 8 r + lane / 4 and
// classes 16 q + lane % 4 * 4 + {0 … 3}.
template <class T>
using ScoreShape = tiles::SimtScores<sizeof(T)>;

// kLargest: the rows' largest cosines as well.
template <class T, bool kLargest>
NF_KERNEL(256)
plain_scores_kernel(PlainScores<T> task) {
  using S = ScoreShape<T>;
  constexpr int kVec = kVectorOf<T>;
  SharedMemory shared;
  T* stages = shared.take<T>(S::kStages * S::kStage);
  const int64_t splits = (task.width + S::kClasses - 1) / S::kClasses, row_blocks = block_count() / splits;
  const int64_t row_block = block_id() % row_blocks, split = block_id() / row_blocks;
  const int64_t first_row = row_block * S::kRows, first_class = split * S::kClasses;

  const auto fetch = [&](int64_t depth, int stage) {
    if (depth < task.dim) {
      T* x = stages + stage * S::kStage;
      fetch_block<S::kRows, S::kDepth, S::kThreads>(task.x_hat, first_row, task.batch, depth, task.dim,
                                                    task.dim, x, S::kDepth, KeyInOrder());
      fetch_block<S::kClasses, S::kDepth, S::kThreads>(task.w_hat, first_class, task.width, depth, task.dim,
                                                       task.dim, x + S::kRows * S::kDepth, S::kDepth,
                                                       KeyByFour());
    }
    copy_async_commit();  // also when empty: a wait counts groups
  };

  const int warp_row = warp_id() / 2 * S::kWarpRows + lane_id() / 4;
  const int warp_class = warp_id() % 2 * 64 + lane_id() % 4 * 4;
  T acc[kRounds<T>][4][4] = {};
  fetch(0, 0);
  int stage = 0;
  for (int64_t depth = 0; depth < task.dim; depth += S::kDepth) {
    copy_async_wait<0>();
    sync_block();  // this stage's copies, made by all threads, before its reads; and the last stage's reads
                   // before the fetch below overwrites it
    fetch(depth + S::kDepth, stage ^ 1);
    const T* x = stages + stage * S::kStage;
    const T* w = x + S::kRows * S::kDepth;
#pragma unroll 2
    for (int k = 0; k < S::kDepth; k += kVec) {
      Vector<T, kVec> a[kRounds<T>];
#pragma unroll
      for (int r = 0; r < kRounds<T>; ++r) {
        const int row = warp_row + 8 * r;
        a[r] = load_vector<kVec>(x + row * S::kDepth + swizzled<T>(k, KeyInOrder()(row)));
      }
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = warp_class + 16 * q + j;
          const auto b = load_vector<kVec>(w + row * S::kDepth + swizzled<T>(k, KeyByFour()(row)));
#pragma unroll
          for (int r = 0; r < kRounds<T>; ++r)
#pragma unroll
            for (int e = 0; e < kVec; ++e) acc[r][q][j] += a[r].at[e] * b.at[e];
        }
    }
    stage ^= 1;
  }
  sync_block();  // the last stage's reads, before its place becomes scratch

  T* scratch = stages;  // [2 sums and the largest cosine, 2 warps across, kRows]
#pragma unroll
  for (int r = 0; r < kRounds<T>; ++r) {
    const int row = warp_row + 8 * r;
    const int64_t i = first_row + row;
    const bool exists = i < task.batch;
    const math::SoftmaxTerm<T> term(exists ? task.rows.template at<T>(i) : math::TermRow<T>{},
                                    task.rows.numbers);
    const int64_t target = exists ? target_place(task.rows.labels[i], task.first, task.width) : -1;
    T value = 0, second = 0, largest = -T(INFINITY);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int64_t column = first_class + warp_class + 16 * q;
      T e[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        math::Cell<T> cell{};
        if (column + j < task.width && column + j != target) {
          cell = term.at(acc[r][q][j], math::PlainExp());
          if constexpr (kLargest) largest = math::larger(largest, acc[r][q][j]);
        }
        e[j] = cell.coefficient;
        value += cell.value;
        second += cell.second;
      }
      // Up to the padding's end, in zeros: plain_gradient fetches it.
      if (exists && column < task.stride)
#pragma unroll
        for (int j = 0; j < 4; j += kVec) {
          Vector<T, kVec> part;
          for (int k = 0; k < kVec; ++k) part.at[k] = e[j + k];
          store_vector_global<kVec>(task.e + i * task.stride + column + j, part);
        }
    }
    value += shuffle_xor(value, 1);
    value += shuffle_xor(value, 2);
    second += shuffle_xor(second, 1);
    second += shuffle_xor(second, 2);
    if constexpr (kLargest) {
      largest = math::larger(largest, shuffle_xor(largest, 1));
      largest = math::larger(largest, shuffle_xor(largest, 2));
    }
    if (lane_id() % 4 == 0) {
      scratch[warp_id() % 2 * S::kRows + row] = value;
      scratch[(2 + warp_id() % 2) * S::kRows + row] = second;
      if constexpr (kLargest) scratch[(4 + warp_id() % 2) * S::kRows + row] = largest;
    }
  }
  const SweepSums& sums = task.sums;
  if (sums.partial == nullptr) return;
  sync_block();  // the scratch, before it is read
  const int64_t i = first_row + thread_id();
  const bool mine = thread_id() < S::kRows && i < task.batch;
  if (mine) {
    const T* of_row = scratch + thread_id();
    sums.value(split, i) = double(of_row[0]) + double(of_row[S::kRows]);
    sums.second(split, splits, i) = double(of_row[2 * S::kRows]) + double(of_row[3 * S::kRows]);
    if constexpr (kLargest)
      sums.largest_cosine(split, splits, i) =
          double(math::larger(of_row[4 * S::kRows], of_row[5 * S::kRows]));
  }
  if (!last_to_arrive(sums.arrivals + row_block, unsigned(splits))) return;
  const int64_t end_row = first_row + S::kRows < task.batch ? first_row + S::kRows : task.batch;
  sums.template add<kLargest>(splits, first_row, end_row, reinterpret_cast<double*>(stages));
}

// dW: kAcross warps along the columns, 64 each, as in sm80_weight_gradient.cu.
template <class T, int kAcross>
struct GradientShape : tiles::SimtWeightGradient<sizeof(T), kAcross> {
  using Base = tiles::SimtWeightGradient<sizeof(T), kAcross>;
  using Tile = HeldTile<T, Base::kDown, kAcross, kRounds<T>, 8>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kResident = 512 / kThreads;
};

template <class T, int kAcross>
NF_KERNEL_RESIDENT((GradientShape<T, kAcross>::kThreads), (GradientShape<T, kAcross>::kResident))
plain_gradient_kernel(PlainGradient<T> task) {
  using S = GradientShape<T, kAcross>;
  using Tile = typename S::Tile;
  SharedMemory shared;
  T* stages = shared.take<T>(S::kValues);
  int* counts = shared.take<int>(Tile::kClasses);
  const int64_t batch = task.classes.batch, dim = task.classes.dim, tile = block_id() * Tile::kClasses;

  const auto fetch = [&](int64_t row, int stage) {
    if (row < batch) {
      T* e = stages + stage * S::kStage;
      fetch_block<S::kDepth, Tile::kClasses, S::kThreads>(task.e, row, batch, tile, task.columns, task.stride,
                                                          e, Tile::kClasses, KeyNone());
      fetch_block<S::kDepth, Tile::kColumns, S::kThreads>(
          task.weighted, row, batch, 0, dim, dim, e + S::kDepth * Tile::kClasses, Tile::kColumns, KeyNone());
    }
    copy_async_commit();  // also when empty: a wait counts groups
  };

  const int place = warp_id() / kAcross * Tile::kWarpClasses + lane_id() / 4;
  const int column = warp_id() % kAcross * 64 + lane_id() % 4 * 2;
  T acc[kRounds<T>][8][2] = {};
  fetch(0, 0);
  int stage = 0;
  for (int64_t row = 0; row < batch; row += S::kDepth) {
    copy_async_wait<0>();
    sync_block();  // this stage's copies, made by all threads, before its reads; and the last stage's reads
                   // before the fetch below overwrites it
    fetch(row + S::kDepth, stage ^ 1);
    const T* e = stages + stage * S::kStage + place;
    const T* v = stages + stage * S::kStage + S::kDepth * Tile::kClasses + column;
#pragma unroll(8 / sizeof(T))
    for (int k = 0; k < S::kDepth; ++k) {
      T a[kRounds<T>];
#pragma unroll
      for (int r = 0; r < kRounds<T>; ++r) a[r] = e[k * Tile::kClasses + 8 * r];
#pragma unroll
      for (int p = 0; p < 8; ++p) {
        const auto b = load_vector<2>(v + k * Tile::kColumns + 8 * p);
#pragma unroll
        for (int r = 0; r < kRounds<T>; ++r) {
          acc[r][p][0] += a[r] * b.at[0];
          acc[r][p][1] += a[r] * b.at[1];
        }
      }
    }
    stage ^= 1;
  }
  copy_async_wait<0>();  // no copy may be under way when its stage becomes scratch
  finish_class_gradient<Tile>(
      task.classes, tile, [&](int r, int pair, int k) { return acc[r][pair][k]; }, stages, counts);
}

template <class T, int kAcross>
void run(Queue& queue, const PlainGradient<T>& task) {
  using S = GradientShape<T, kAcross>;
  launch("plain_gradient", queue, plain_gradient_kernel<T, kAcross>,
         Grid{(task.classes.width + S::Tile::kClasses - 1) / S::Tile::kClasses}, S::kThreads,
         size_t(S::shared()), task);
}

}  // namespace

template <class T>
int64_t plain_splits(int64_t width) {
  return (width + ScoreShape<T>::kClasses - 1) / ScoreShape<T>::kClasses;
}

template <class T>
void plain_scores(Queue& queue, const PlainScores<T>& task) {
  using S = ScoreShape<T>;
  const int64_t row_blocks = (task.batch + S::kRows - 1) / S::kRows;
  launch("plain_scores", queue,
         task.sums.largest ? plain_scores_kernel<T, true> : plain_scores_kernel<T, false>,
         Grid{row_blocks * plain_splits<T>(task.width)}, S::kThreads, size_t(S::shared()), task);
}

template <class T>
void plain_gradient(Queue& queue, const PlainGradient<T>& task) {
  const int64_t dim = task.classes.dim;
  STD_TORCH_CHECK(dim * sizeof(T) % 16 == 0 && dim <= kMostPlainColumns,
                  "plain_gradient: expected rows of a multiple of 16 bytes and at most 512 columns, got ",
                  dim);
  tiles::dispatch_gradient(dim, [&]<int kAcross>() { run<T, kAcross>(queue, task); });
}

template int64_t plain_splits<float>(int64_t);
template int64_t plain_splits<double>(int64_t);
template void plain_scores(Queue&, const PlainScores<float>&);
template void plain_scores(Queue&, const PlainScores<double>&);
template void plain_gradient(Queue&, const PlainGradient<float>&);
template void plain_gradient(Queue&, const PlainGradient<double>&);

}  // namespace nf
