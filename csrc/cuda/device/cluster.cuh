// Blocks of a cluster (compute capability 9.0): neighbours along x that run at the same time and reach into each
// other's shared memory. Grid::cluster says at the launch how many they are.
//
// A block must not end while others may still reach into it, nor be reached into before it has begun: sync_cluster
// stands at both ends.
#pragma once

#include <device/mbarrier.cuh>
#include <device/tensor_map.cuh>

namespace nf {

// Of this block within its cluster.
NF_DEVICE int cluster_rank() {
  uint32_t rank = 0;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return int(rank);
}

// A barrier of all threads of the cluster.
NF_DEVICE void sync_cluster() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Arrives at that barrier of block `rank`, which lies where this block has `barrier`.
NF_DEVICE void barrier_arrive_of(Barrier* barrier, int rank) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{\n\t.reg .b32 there;\n\t"
      "mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n\t}"
      :
      : "r"(detail::shared_address(barrier)), "r"(rank)
      : "memory");
#endif
}

// load_box into the same place of each of the cluster's kBlocks blocks; its bytes arrive at each one's barrier, where
// they may come before they are expected, within the phase.
template <int kBlocks>
NF_DEVICE void load_box_to_all(void* shared, const TensorMap& map, int64_t row, int64_t column,
                               Barrier* barrier) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], "
      "[%1, {%2, %3}], [%4], %5;"
      :
      : "r"(detail::shared_address(shared)), "l"(reinterpret_cast<uint64_t>(&map)), "r"(int(column)),
        "r"(int(row)), "r"(detail::shared_address(barrier)), "h"(uint16_t((1 << kBlocks) - 1))
      : "memory");
#endif
}

}  // namespace nf
