// csrc/cuda/device/cluster.cuh for a CPU: the blocks of a cluster are run together, see ../block.h.
#pragma once

#include <device/mbarrier.cuh>
#include <device/tensor_map.cuh>

namespace nf {

inline int cluster_rank() { return emulation::rank(); }
inline void sync_cluster(emulation::Where where = emulation::Where::current()) {
  emulation::meet_cluster(where);
}
inline void barrier_arrive_of(Barrier* barrier, int rank) { emulation::arrive_at_barrier_of(barrier, rank); }
template <int kBlocks>
void load_box_to_all(void* shared, const TensorMap& map, int64_t row, int64_t column, Barrier* barrier) {
  if (kBlocks * emulation::place.of_block != emulation::place.threads)
    emulation::fail("load_box_to_all of %d blocks, which are not the cluster", kBlocks);
  emulation::load_to_barriers(barrier, {map.matrix, row, column, static_cast<unsigned char*>(shared)});
}

}  // namespace nf
