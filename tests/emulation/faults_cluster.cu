// What faults_hopper.cu is, for clusters: each block copies its share of a matrix into all of them, with a mistake that
// can be switched on. Every block sums the columns of all of it.
#include <torch/csrc/stable/ops.h>

#include <device/cluster.cuh>
#include <device/launch.cuh>
#include <device/shared_memory.cuh>
#include <device/warpgroup.cuh>

namespace {

using namespace nf;

// clang-format off
#define FOR_EACH_FAULT(DO) \
  DO(no_sync_before) DO(no_sync_after) DO(freed_here_alone) DO(freed_there_alone) \
  DO(freed_twice) DO(too_few_bytes) DO(not_of_all)
// clang-format on

enum Fault {
  none,
#define NAME(name) name,
  FOR_EACH_FAULT(NAME)
#undef NAME
};

constexpr int kCluster = 2, kStages = 2, kRows = 8, kWide = 32, kBox = kRows * kBoxBytes;
constexpr int kClusterThreads = 2 * kWarpgroup, kColumns = kCluster * kWide;

template <int kFault>
NF_KERNEL(kClusterThreads)
column_sums(NF_TENSOR_MAP x, int64_t rows, float* out) {
  SharedMemory shared;
  auto* const stages = shared.take_boxes<unsigned char>(kStages * kCluster * kBox);
  Barrier* const full = shared.take<Barrier>(kStages);
  Barrier* const empty = shared.take<Barrier>(kStages);
  constexpr bool kOneSide = kFault == freed_here_alone || kFault == freed_there_alone;
  if (thread_id() == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + stage, 1);
      barrier_init(empty + stage, (kOneSide ? 1 : kCluster) * kWarpgroup / kWarp);
    }
    fence_barriers();
  }
  if (kFault == no_sync_before)
    sync_block();
  else
    sync_cluster();  // the barriers of all, before anybody reaches for them

  if (warpgroup_id() == 0) {
    if (thread_id() == 0) {
      RingPlace<kStages> at(1);
      for (int64_t row = 0; row < rows; row += kRows, at.advance()) {
        barrier_wait(empty + at.stage, at.parity);
        barrier_arrive_expect(full + at.stage, (kFault == too_few_bytes ? 1 : kCluster) * kBox);
        unsigned char* const to = stages + (at.stage * kCluster + cluster_rank()) * kBox;
        if (kFault == not_of_all && row > 0 && cluster_rank() == 1)
          load_box(to, x, row, kWide, full + at.stage);
        else
          load_box_to_all<kCluster>(to, x, row, cluster_rank() * kWide, full + at.stage);
      }
    }
  } else {
    const int column = thread_id() % kWarpgroup;
    float sum = 0;
    RingPlace<kStages> at(0);
    for (int64_t row = 0; row < rows; row += kRows, at.advance()) {
      barrier_wait(full + at.stage, at.parity);
      if (column < kColumns)
        for (int r = 0; r < kRows; ++r) {
          const auto* of_row = reinterpret_cast<const float*>(
              stages + (at.stage * kCluster + column / kWide) * kBox + r * kBoxBytes);
          sum += of_row[(column % kWide / 4 ^ r) * 4 + column % 4];
        }
      sync_warp();  // all lanes have read before one of them says so
      for (int rank = 0; rank < kCluster; ++rank) {
        const bool here = rank == cluster_rank();
        if ((kFault == freed_here_alone && !here) || (kFault == freed_there_alone && here)) continue;
        if (lane_id() == rank) barrier_arrive_of(empty + at.stage, rank);
        if (kFault == freed_twice && lane_id() == rank) barrier_arrive_of(empty + at.stage, rank);
      }
    }
    if (column < kColumns) out[block_id() * kColumns + column] = sum;
  }
  if (kFault != no_sync_after) sync_cluster();  // no block ends that another one still tells of a stage
  barriers_held();
}

// x [rows, 64] in float32; of so many blocks each has its sums in a row of the result.
template <int kFault>
Tensor run(const char* name, const Tensor& x, int64_t blocks) {
  Queue queue(x);
  const Tensor out = torch::stable::new_empty(x, {blocks, kColumns}, ScalarType::Float);
  launch(name, queue, column_sums<kFault>, Grid{.x = blocks, .cluster = kCluster}, kClusterThreads,
         shared_bytes<unsigned char>(kStages * kCluster * kBox) + 2 * shared_bytes<Barrier>(kStages),
         tensor_map(name, x.const_data_ptr(), x.scalar_type(), x.size(0), x.size(1), x.stride(0), kRows),
         x.size(0), data_of<float>(Array(out)));
  return out;
}

#define FAULTY(name)                                                           \
  Tensor name##_op(const Tensor& x, int64_t blocks, bool faulty) {             \
    return faulty ? run<name>(#name, x, blocks) : run<none>(#name, x, blocks); \
  }
FOR_EACH_FAULT(FAULTY)
#undef FAULTY

}  // namespace

STABLE_TORCH_LIBRARY(NF_NAMESPACE, m) {
#define DEFINE(name) m.def(#name "(Tensor x, int blocks, bool faulty) -> Tensor");
  FOR_EACH_FAULT(DEFINE)
}

NF_CUDA_LIBRARY(m) {
#define IMPLEMENT(name) m.impl(#name, TORCH_BOX(&name##_op));
  FOR_EACH_FAULT(IMPLEMENT)
}
