// Bulk copies of boxes of a matrix between global and shared memory (TMA, compute capability 9.0).
//
// One thread starts a copy; a load's bytes arrive at a barrier (mbarrier.cuh), stores are counted in groups as those of
// copy_async.cuh are. What lies beyond the matrix is read as zeros, and not written. A box of 128-byte rows lies in
// shared memory in the swizzle that wgmma reads (warpgroup.cuh): of every 1024 bytes the 16-byte chunk c of row r lies
// at chunk c ^ r, so boxes begin at multiples of 1024 bytes (SharedMemory::take_boxes).
#pragma once

#include <cuda.h>  // the types alone: its functions are asked for by name when they are needed

#include <device/mbarrier.cuh>

#include "cuda/device/stored.cuh"

namespace nf {

constexpr int kBoxBytes = 128;  // of a row of a box

struct TensorMap {
  CUtensorMap map;
};

// How a kernel takes one: by value, and it is read where it was put.
#define NF_TENSOR_MAP const __grid_constant__::nf::TensorMap

// A matrix [rows, columns] of `type` (2 or 4 bytes) in global memory, rows `stride` values apart, copied in boxes of
// box_rows rows and 128 bytes. Throws unless data lies at a multiple of 16 bytes and the stride is one.
inline TensorMap tensor_map(const char* name, const void* data, ScalarType type, int64_t rows,
                            int64_t columns, int64_t stride, int box_rows) {
  // Of the driver, which is there on a machine with a GPU only: nothing is linked against it.
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
    const cudaError_t asked =
        cudaGetDriverEntryPointByVersion(kName, &entry, 12000, cudaEnableDefault, &found);
#else  // has no other, and CUDA 13 no longer has this one
    const cudaError_t asked = cudaGetDriverEntryPoint(kName, &entry, cudaEnableDefault, &found);
#endif
    check_cuda(asked, kName);
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "cuTensorMapEncodeTiled: not in this driver");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  const int64_t item = type == ScalarType::Float ? 4 : 2;
  const auto kind = type == ScalarType::Float      ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : type == ScalarType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t strides[] = {cuuint64_t(stride * item)};
  const cuuint32_t box[] = {cuuint32_t(kBoxBytes / item), cuuint32_t(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  TensorMap out;
  const CUresult result = encode(&out.map, kind, 2, const_cast<void*>(data), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, name, ": no bulk copies of [", rows, ", ", columns,
                  "] with stride ", stride, ", the driver says ", int(result));
  return out;
}

NF_DEVICE void prefetch_map(const TensorMap& map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("prefetch.tensormap [%0];" : : "l"(reinterpret_cast<uint64_t>(&map)) : "memory");
#endif
}

// The box whose first value is (row, column), into `shared`; its bytes arrive at `barrier`, which expects them already.
// One thread.
NF_DEVICE void load_box(void* shared, const TensorMap& map, int64_t row, int64_t column, Barrier* barrier) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];"
      :
      : "r"(detail::shared_address(shared)), "l"(reinterpret_cast<uint64_t>(&map)), "r"(int(column)),
        "r"(int(row)), "r"(detail::shared_address(barrier))
      : "memory");
#endif
}

// The other way. Whoever wrote `shared` has fenced it (fence_shared_for_bulk) and met the thread that stores.
NF_DEVICE void store_box(const TensorMap& map, int64_t row, int64_t column, const void* shared) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
               :
               : "l"(reinterpret_cast<uint64_t>(&map)), "r"(int(column)), "r"(int(row)),
                 "r"(detail::shared_address(shared))
               : "memory");
#endif
}

// Closes the thread's stores so far into a group.
NF_DEVICE void commit_stores() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until all but the latest N groups have read their shared memory, which may then be written again.
template <int N>
NF_DEVICE void wait_stores_read() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(N) : "memory");
#endif
}

// Until all but the latest N groups are in global memory: before the thread ends, or tells others of it.
template <int N>
NF_DEVICE void wait_stores() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("cp.async.bulk.wait_group %0;" : : "n"(N) : "memory");
#endif
}

// By every thread that has written shared memory by ordinary stores which wgmma or a bulk copy will read, before it
// meets the thread that starts those.
NF_DEVICE void fence_shared_for_bulk() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace nf
