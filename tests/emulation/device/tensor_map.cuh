// csrc/cuda/device/tensor_map.cuh for a CPU: the map is the matrix itself, refused where the driver would refuse it.
// ../bulk.h has the rest.
#pragma once

#include <bulk.h>
#include <clocks.h>

#include <device/mbarrier.cuh>

#include "cuda/device/stored.cuh"

namespace nf {

using emulation::kBoxBytes;

struct TensorMap {
  emulation::Matrix matrix;
};

#define NF_TENSOR_MAP const ::nf::TensorMap

inline TensorMap tensor_map(const char* name, const void* data, ScalarType type, int64_t rows,
                            int64_t columns, int64_t stride, int box_rows) {
  const int item = type == ScalarType::Float ? 4 : 2;
  constexpr int64_t kMostSize = int64_t{1} << 32, kMostStride = int64_t{1} << 40;
  const bool taken = reinterpret_cast<uintptr_t>(data) % 16 == 0 && data != nullptr &&
                     stride * item % 16 == 0 && stride > 0 && stride * item < kMostStride && rows > 0 &&
                     rows <= kMostSize && columns > 0 && columns <= kMostSize && box_rows > 0 &&
                     box_rows <= 256;
  STD_TORCH_CHECK(taken, name, ": no bulk copies of [", rows, ", ", columns, "] with stride ", stride,
                  ", the driver says ", 1);
  return {{static_cast<unsigned char*>(const_cast<void*>(data)), item, rows, columns, stride, box_rows}};
}

inline void prefetch_map(const TensorMap&) {}

inline void load_box(void* shared, const TensorMap& map, int64_t row, int64_t column, Barrier* barrier) {
  emulation::load_to_barrier(barrier, {map.matrix, row, column, static_cast<unsigned char*>(shared)});
}

inline void store_box(const TensorMap& map, int64_t row, int64_t column, const void* shared) {
  emulation::store_box(map.matrix, row, column, shared);
}

inline void commit_stores() { emulation::commit_stores(); }

template <int N>
void wait_stores_read() {
  emulation::wait_stores(N, true);
}

template <int N>
void wait_stores() {
  emulation::wait_stores(N, false);
}

inline void fence_shared_for_bulk() { emulation::fence_for_agents(); }

}  // namespace nf
