// Matrix products of tiles through torch's BLAS. Inside a parallel region each call runs on its own
// thread, which is how the engine uses it: one product per core, on tiles that fit its cache.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"

namespace nf::cpu {

// A borrowed view of memory: element (r, c) at data[r * row_stride + c * column_stride].
template <class T>
struct Matrix {
  T* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride = 1;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

template <class T>
Tensor as_tensor(const Matrix<T>& m) {
  const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      m.data, 2, sizes, strides, 0, sizeof(T) == 8 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// out = a b, or out += a b.
template <class T>
void multiply(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& out, bool accumulate = false) {
  const Tensor ta = as_tensor(a), tb = as_tensor(b), to = as_tensor(out);
  TORCH_ERROR_CODE_CHECK(accumulate
                             ? aoti_torch_cpu_addmm_out(to.get(), to.get(), ta.get(), tb.get(), 1.0, 1.0)
                             : aoti_torch_cpu_mm_out(to.get(), ta.get(), tb.get()));
}

}  // namespace nf::cpu
