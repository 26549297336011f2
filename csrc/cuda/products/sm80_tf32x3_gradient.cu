// dW = P(E^T weighted + targets) of float32 on tensor cores (mma.sync, compute capability 8.0), three products of
// tf32 for one (tf32x3.cuh); class_gradient.cuh has what follows the product.
//
// A block owns some classes and all columns: its warps take 32 classes x 64 columns each, as in
// sm80_weight_gradient.cu. E and the weighted features stream through kStages buffers of kDepth rows. The rows are
// what is summed over, and a lane reads its values one by one: rows are 8 values longer than they are, so that the
// four rows of a load lie in different banks.
//
// E and the factor of a row may be large and small where their product is neither: at a scale of 80, E reaches e^80 and
// the factor e^-80, of which tf32, whose second part ends at 2^-136, would have nothing left. So E gets the factor's power
// of two before it is split.
//
// These kernels have only been compiled and emulated so far.
#include <device/shared_memory.cuh>

#include "cuda/device/mma_tile.cuh"
#include "cuda/device/tf32x3.cuh"
#include "cuda/products/sm80_tf32x3.h"

namespace nf {
namespace {

template <int kAcross>
struct Shape : tiles::Sm80Tf32Gradient<kAcross> {
  using Base = tiles::Sm80Tf32Gradient<kAcross>;
  using Tile = HeldTile<float, Base::kDown, kAcross, 4, 8>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kResident = 512 / kThreads;
  static_assert(Tile::kScratch <= Base::kStages * Base::kStage);
};

template <int kAcross>
NF_KERNEL_RESIDENT(Shape<kAcross>::kThreads, Shape<kAcross>::kResident)
tf32_gradient_kernel(Tf32Gradient task) {
  using S = Shape<kAcross>;
  SharedMemory shared;
  float* stages = shared.take<float>(S::kStages * S::kStage);
  int* counts = shared.take<int>(S::kClasses);
  const int64_t batch = task.classes.batch, dim = task.classes.dim, tile = block_id() * S::kClasses;

  const auto fetch = [&](int64_t row, int stage) {
    if (row < batch) {
      float* e = stages + stage * S::kStage;
      fetch_block<S::kDepth, S::kClasses, S::kThreads>(task.e, row, batch, tile, task.columns, task.stride, e,
                                                       S::kClassStride, KeyNone());
      fetch_block<S::kDepth, S::kColumns, S::kThreads>(task.weighted, row, batch, 0, dim, dim,
                                                       e + S::kDepth * S::kClassStride, S::kColumnStride,
                                                       KeyNone());
      if (thread_id() < S::kDepth / 4) {
        const bool valid = row + thread_id() * 4 < batch;
        copy_async_16(e + S::kPowers + thread_id() * 4, task.powers + (valid ? row + thread_id() * 4 : 0),
                      valid);
      }
    }
    copy_async_commit();  // also when empty: a wait counts groups
  };

  const int g = lane_id() / 4, t = lane_id() % 4;
  const int of_e = t * S::kClassStride + warp_id() / kAcross * 32 + g;
  const int of_v = S::kDepth * S::kClassStride + t * S::kColumnStride + warp_id() % kAcross * 64 + g;
  float acc[8][2][4] = {};
  for (int stage = 0; stage < S::kStages - 1; ++stage) fetch(int64_t(stage) * S::kDepth, stage);
  int stage = 0;
  for (int64_t row = 0; row < batch; row += S::kDepth) {
    copy_async_wait<S::kStages - 2>();
    sync_block();  // this step's copies, made by all threads, before its reads; and the last step's reads
                   // before the fetch below overwrites their stage
    fetch(row + (S::kStages - 1) * S::kDepth, (stage + S::kStages - 1) % S::kStages);
    const float* e = stages + stage * S::kStage + of_e;
    const float* v = stages + stage * S::kStage + of_v;
    const float* powers = stages + stage * S::kStage + S::kPowers + t;
#pragma unroll 1
    for (int k = 0; k < S::kDepth; k += 8) {
      Tf32Left a[2][1];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          a[m][0].split(r, e[(k + r / 2 * 4) * S::kClassStride + m * 16 + r % 2 * 8] * powers[k + r / 2 * 4]);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        Tf32Right b[1];
#pragma unroll
        for (int r = 0; r < 2; ++r) b[0].split(r, v[(k + r * 4) * S::kColumnStride + n * 8]);
        multiply_tf32x3(a, b, acc[n]);
      }
    }
    stage = (stage + 1) % S::kStages;
  }
  copy_async_wait<0>();  // no copy may be under way when its stage becomes scratch

  finish_class_gradient<typename S::Tile>(
      task.classes, tile, [&](int r, int pair, int k) { return acc[pair][r / 2][r % 2 * 2 + k]; }, stages,
      counts);
}

template <int kAcross>
void run(Queue& queue, const Tf32Gradient& task) {
  using S = Shape<kAcross>;
  launch("tf32_gradient", queue, tf32_gradient_kernel<kAcross>,
         Grid{(task.classes.width + S::kClasses - 1) / S::kClasses}, S::kThreads, size_t(S::shared()), task);
}

}  // namespace

void tf32_gradient(Queue& queue, const Tf32Gradient& task) {
  const int64_t dim = task.classes.dim;
  STD_TORCH_CHECK(dim % 4 == 0 && dim <= tiles::kTf32GradientColumns,
                  "tf32_gradient: expected a multiple of 4 columns, at most 512, got ", dim);
  tiles::dispatch_gradient(dim, [&]<int kAcross>() { run<kAcross>(queue, task); });
}

}  // namespace nf
