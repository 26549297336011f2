// Matrix products through torch: cuBLAS with float32 accumulation, on the current stream.
//
// 16-bit factors give a float32 result (aten::mm.dtype_out), which torch offers on CUDA only. The
// emulated build of these files runs on CPU tensors; there the factors are widened first.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <device/launch.cuh>

#include "engine/block.h"

namespace nf {

// A borrowed view of device memory: element (r, c) at data[r * row_stride + c * column_stride].
struct Matrix {
  const void* data;
  ScalarType type;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride = 1;

  Matrix transposed() const { return {data, type, columns, rows, column_stride, row_stride}; }
};

inline Tensor as_tensor(const Matrix& m, const Tensor& like) {
  const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
  return torch::stable::from_blob(const_cast<void*>(m.data), {sizes, 2}, {strides, 2}, like.device(), m.type);
}

// out = a b. `like` lends its device. (The stable ABI passes no Scalar, so there is no addmm here.)
inline void multiply(const Tensor& like, const Matrix& a, const Matrix& b, const Matrix& out) {
  if (out.rows == 0 || out.columns == 0) return;
  Tensor ta = as_tensor(a, like), tb = as_tensor(b, like), to = as_tensor(out, like);
  bool widens = a.type != out.type;
  if (widens && !like.is_cuda()) {
    ta = torch::stable::to(ta, out.type);
    tb = torch::stable::to(tb, out.type);
    widens = false;
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(ta), from(tb)};
  size_t n = 2;
  if (widens) stack[n++] = from(out.type);
  stack[n] = from(to);
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", widens ? "dtype_out" : "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the op returns `out`: take and drop the handle
}

// Scratch on the device of `like`, uninitialised.
inline Tensor device_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                           ScalarType type) {
  return new_tensor(sizes, type, Place(like));
}

inline void allocate(Block& block, const Tensor& like) {
  block.allocate([&](int64_t bytes) { return device_empty(like, {bytes}, ScalarType::Byte); });
}

}  // namespace nf
