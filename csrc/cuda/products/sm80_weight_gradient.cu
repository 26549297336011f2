// dW = P(E^T weighted + targets) on tensor cores (mma.sync, compute capability 8.0); class_gradient.cuh has
// what follows the product.
//
// A block owns some classes and all columns: its warps take 32 classes x 64 columns each. E and the weighted
// features stream through kStages buffers of kDepth rows; both come transposed out of shared memory, since
// the rows are what is summed over. Nothing is summed across blocks.
#include <device/shared_memory.cuh>

#include "cuda/device/mma_tile.cuh"
#include "cuda/products/sm80_weight_gradient.h"

namespace nf {
namespace {

// kAcross warps along the columns, 64 each.
template <int kAcross>
struct Shape : tiles::Sm80WeightGradient<kAcross> {
  using Base = tiles::Sm80WeightGradient<kAcross>;
  static constexpr int kThreads = kWarp * kAcross * Base::kDown;
  static constexpr int kResident = kAcross < 8 ? 2 : 1;
  using Tile = HeldTile<float, Base::kDown, kAcross, 4, 8>;
  static_assert(Tile::kScratch * sizeof(float) <= Base::kStages * Base::kStage * sizeof(BFloat16));
};
constexpr int kDepth = tiles::Sm80WeightGradient<2>::kDepth;

template <int kAcross>
NF_KERNEL_RESIDENT(Shape<kAcross>::kThreads, Shape<kAcross>::kResident)
weight_gradient_kernel(WeightGradient task) {
  using S = Shape<kAcross>;
  SharedMemory shared;
  BFloat16* stages = shared.take<BFloat16>(S::kStages * S::kStage);
  int* counts = shared.take<int>(S::kClasses);
  const int64_t batch = task.classes.batch, tile = block_id() * S::kClasses;
  const int down = warp_id() / kAcross, across = warp_id() % kAcross;

  const auto fetch = [&](int64_t row, int stage) {
    if (row < batch) {
      BFloat16* e = stages + stage * S::kStage;
      BFloat16* v = e + kDepth * S::kClasses;
      fetch_block<kDepth, S::kClasses, S::kThreads>(task.e, row, batch, tile, task.columns, task.stride, e,
                                                    S::kClasses, KeyInOrder());
      fetch_block<kDepth, S::kColumns, S::kThreads>(task.weighted, row, batch, 0, task.classes.dim,
                                                    task.classes.dim, v, S::kColumns, KeyInOrder());
    }
    copy_async_commit();  // also when empty: a wait counts groups
  };

  float acc[2][8][4] = {};
  for (int stage = 0; stage < S::kStages - 1; ++stage) fetch(int64_t(stage) * kDepth, stage);
  const int matrix = lane_id() / 8, i = lane_id() % 8;  // which of the four an ldmatrix reads, its row
  int stage = 0;
  for (int64_t row = 0; row < batch; row += kDepth) {
    copy_async_wait<S::kStages - 2>();
    sync_block();  // this step's copies, made by all threads, before its reads; and the last step's reads
                   // before the fetch below overwrites their stage
    fetch(row + (S::kStages - 1) * kDepth, (stage + S::kStages - 1) % S::kStages);
    const BFloat16* e = stages + stage * S::kStage;
    const BFloat16* v = e + kDepth * S::kClasses;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_matrix_x4_transposed(a[m], e + (k + matrix / 2 * 8 + i) * S::kClasses +
                                            swizzled(down * 32 + m * 16 + matrix % 2 * 8, i));
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t b[4];
        load_matrix_x4_transposed(
            b, v + (k + matrix % 2 * 8 + i) * S::kColumns + swizzled(across * 64 + (n + matrix / 2) * 8, i));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_bf16(acc[m][n], a[m], low);
          mma_bf16(acc[m][n + 1], a[m], high);
        }
      }
    }
    stage = (stage + 1) % S::kStages;
  }
  copy_async_wait<0>();  // no copy may be under way when its stage becomes scratch

  finish_class_gradient<typename S::Tile>(
      task.classes, tile, [&](int r, int pair, int k) { return acc[r / 2][pair][r % 2 * 2 + k]; },
      reinterpret_cast<float*>(stages), counts);
}

template <int kAcross>
void run(Queue& queue, const WeightGradient& task) {
  using S = Shape<kAcross>;
  launch("weight_gradient", queue, weight_gradient_kernel<kAcross>,
         Grid{(task.classes.width + S::kClasses - 1) / S::kClasses}, S::kThreads, size_t(S::shared()), task);
}

}  // namespace

void weight_gradient(Queue& queue, const WeightGradient& task) {
  const int64_t dim = task.classes.dim;
  STD_TORCH_CHECK(dim % 8 == 0 && dim <= kMostColumns,
                  "weight_gradient: expected a multiple of 8 columns, at most 512, got ", dim);
  tiles::dispatch_gradient(dim, [&]<int kAcross>() { run<kAcross>(queue, task); });
}

}  // namespace nf
