// normalize and its backward on the CPU. Contiguous rows go through the row kernels. A channel axis is
// walked in blocks of kColumns neighbouring positions, so that every access stays within a cache line
// run; each block is gathered into contiguous rows, which then meet the same row kernels.
#include <optional>
#include <vector>

#include "cpu/library.h"
#include "row_layout.h"

namespace nf::cpu {
namespace {

constexpr int64_t kColumns = 16;

// rows[c][d] <-> memory[d * inner + c], c < columns, elements of `item` bytes.
template <class E>
void transpose(const E* from, int64_t from_stride, E* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}

void transpose_bytes(const char* from, int64_t from_stride, char* to, int64_t to_stride, int64_t rows,
                     int64_t columns, int64_t item) {
  if (item == 8)
    transpose(reinterpret_cast<const uint64_t*>(from), from_stride, reinterpret_cast<uint64_t*>(to),
              to_stride, rows, columns);
  else if (item == 4)
    transpose(reinterpret_cast<const uint32_t*>(from), from_stride, reinterpret_cast<uint32_t*>(to),
              to_stride, rows, columns);
  else
    transpose(reinterpret_cast<const uint16_t*>(from), from_stride, reinterpret_cast<uint16_t*>(to),
              to_stride, rows, columns);
}

// Calls one(inputs, output, index) for every row; null inputs stay null. Rows of a channel axis are
// copied out of and into place around the call.
template <class One>
void each_row(const RowLayout& layout, int64_t item, std::vector<const char*> inputs, char* output,
              const One& one) {
  const int64_t n = layout.length;
  if (layout.inner == 1) {
    for_rows(layout.outer, n, [&](int64_t row) {
      const char* in[2] = {nullptr, nullptr};
      for (size_t k = 0; k < inputs.size(); ++k)
        if (inputs[k] != nullptr) in[k] = inputs[k] + row * n * item;
      one(in, output + row * n * item, row);
    });
    return;
  }
  const int64_t blocks = (layout.inner + kColumns - 1) / kColumns;
  for_rows(layout.outer * blocks, n * kColumns, [&](int64_t block) {
    const int64_t outer = block / blocks, first = block % blocks * kColumns;
    const int64_t columns = std::min(kColumns, layout.inner - first);
    const int64_t offset = (outer * n * layout.inner + first) * item, row_bytes = n * item;
    std::vector<char> rows(size_t((inputs.size() + 1) * kColumns * row_bytes));
    char* result = rows.data() + inputs.size() * kColumns * row_bytes;
    const char* in[2] = {nullptr, nullptr};
    for (size_t k = 0; k < inputs.size(); ++k)
      if (inputs[k] != nullptr)
        transpose_bytes(inputs[k] + offset, layout.inner, rows.data() + k * kColumns * row_bytes, n, n,
                        columns, item);
    for (int64_t c = 0; c < columns; ++c) {
      for (size_t k = 0; k < inputs.size(); ++k)
        if (inputs[k] != nullptr) in[k] = rows.data() + (k * kColumns + c) * row_bytes;
      one(in, result + c * row_bytes, outer * layout.inner + first + c);
    }
    transpose_bytes(result, n, output + offset, layout.inner, columns, n, item);
  });
}

const char* bytes(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

void check_arguments(const char* op, const Tensor& x, int64_t p) {
  if (!is_floating(x.scalar_type()))
    fail(op, ": expected `x` to be float64, float32, float16 or bfloat16, got ", name_of(x.scalar_type()));
  if (p != 1 && p != 2) fail(op, ": expected `p` to be 1 or 2, got ", p);
}

template <class T>
void forward(const Tensor& x, const RowLayout& layout, int64_t p, double eps, Tensor& y, Tensor& norm) {
  const StoredRows<T>& kernel = stored_rows<T>(x.scalar_type());
  T* norms = static_cast<T*>(norm.mutable_data_ptr());
  each_row(layout, kernel.item, {bytes(x)}, static_cast<char*>(y.mutable_data_ptr()),
           [&](const char* const* in, char* out, int64_t row) {
             norms[row] = kernel.normalize(in[0], layout.length, int(p), T(eps), out);
           });
}

template <class T>
void backward(const std::optional<Tensor>& grad_y, const std::optional<Tensor>& grad_norm, const Tensor& x,
              const Tensor& norm, const RowLayout& layout, int64_t p, double eps, Tensor& dx) {
  const StoredRows<T>& kernel = stored_rows<T>(x.scalar_type());
  const T* norms = static_cast<const T*>(norm.const_data_ptr());
  const T* grad_norms = grad_norm ? static_cast<const T*>(grad_norm->const_data_ptr()) : nullptr;
  each_row(layout, kernel.item, {bytes(x), grad_y ? bytes(*grad_y) : nullptr},
           static_cast<char*>(dx.mutable_data_ptr()), [&](const char* const* in, char* out, int64_t row) {
             kernel.vjp(in[0], in[1], layout.length, int(p), T(eps), norms[row],
                        grad_norms ? grad_norms[row] : T(0), out);
           });
}

std::tuple<Tensor, Tensor> normalize(Tensor x, int64_t dim, int64_t p, double eps) {
  check_arguments("normalize", x, p);
  const RowLayout layout = row_layout("normalize", x, dim);
  std::vector<int64_t> norm_sizes(x.sizes().begin(), x.sizes().end());
  norm_sizes[size_t(dim)] = 1;
  const ScalarType wide = accumulator(x.scalar_type());
  Tensor y = fresh_like(x), norm = fresh(norm_sizes, wide);
  if (wide == ScalarType::Double)
    forward<double>(x, layout, p, eps, y, norm);
  else
    forward<float>(x, layout, p, eps, y, norm);
  return {y, norm};
}

Tensor normalize_backward(std::optional<Tensor> grad_y, std::optional<Tensor> grad_norm, Tensor x,
                          Tensor norm, int64_t dim, int64_t p, double eps) {
  check_arguments("normalize_backward", x, p);
  const RowLayout layout = row_layout("normalize_backward", x, dim);
  Tensor dx = fresh_like(x);
  if (accumulator(x.scalar_type()) == ScalarType::Double)
    backward<double>(grad_y, grad_norm, x, norm, layout, p, eps, dx);
  else
    backward<float>(grad_y, grad_norm, x, norm, layout, p, eps, dx);
  return dx;
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  m.impl("normalize", TORCH_BOX(&nf::cpu::normalize));
  m.impl("normalize_backward", TORCH_BOX(&nf::cpu::normalize_backward));
}
