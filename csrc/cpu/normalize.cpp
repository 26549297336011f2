// normalize and its backward on the CPU: contiguous rows one by one, a channel axis in blocks of
// neighbouring columns, along which every access is contiguous.
#include "math/normalize.h"

#include <cstring>
#include <optional>
#include <vector>

#include "cpu/library.h"
#include "engine/cosine_arguments.h"
#include "engine/row_layout.h"

namespace nf::cpu {
namespace {

// Where a block of neighbouring columns of a channel axis lies: `columns` of them, the first of which is
// row `row` of the tensor and begins `offset` elements into it.
struct ColumnBlock {
  int64_t row;
  int64_t columns;
  int64_t offset;
};

template <class Body>
void for_column_blocks(const RowLayout& layout, const Tensor& out, const Body& body) {
  const NewPages pages(out);
  char* place = static_cast<char*>(out.mutable_data_ptr());
  const int64_t item = int64_t(out.element_size());
  const int64_t blocks = (layout.inner + kColumns - 1) / kColumns;
  for_rows(layout.outer * blocks, layout.length * std::min(layout.inner, kColumns), [&](int64_t i) {
    const int64_t outer = i / blocks, first = i % blocks * kColumns;
    const ColumnBlock block{outer * layout.inner + first, std::min(kColumns, layout.inner - first),
                            outer * layout.length * layout.inner + first};
    if (blocks == 1)  // else its pages are its neighbours' as well
      pages.ask_for(place + block.offset * item, layout.length * layout.inner * item);
    body(block);
  });
}

// A column gathered into a contiguous row, or a row scattered back into its column.
void copy_strided(const char* from, int64_t from_stride, char* to, int64_t to_stride, int64_t count,
                  int64_t item) {
  for (int64_t d = 0; d < count; ++d)
    std::memcpy(to + d * to_stride * item, from + d * from_stride * item, item);
}

const char* bytes(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

// Where `out` has no room in the last cache. Rows of 16-bit numbers, whose conversions cost more than their traffic,
// were faster with plain stores everywhere.
bool goes_past_caches(const Tensor& out) {
  const int64_t item = int64_t(out.element_size());
  return item >= 4 && out.numel() * item > last_cache_bytes();
}

// Calls body(first, rows) for blocks of contiguous rows, whose part of `out` has its pages by then.
template <class Body>
void for_row_blocks(const RowLayout& layout, int64_t row_bytes, const Tensor& out, const Body& body) {
  constexpr int64_t kBlockBytes = int64_t(1) << 18;  // new pages are still in L2 when their rows come
  const NewPages pages(out);
  char* place = static_cast<char*>(out.mutable_data_ptr());
  const int64_t block = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, row_bytes));
  for_row_runs(layout.outer, layout.length, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += block) {
      const int64_t rows = std::min(block, end - first);
      pages.ask_for(place + first * row_bytes, rows * row_bytes);
      body(first, rows);
    }
  });
}

template <class T>
void forward_channels(const StoredRows<T>& kernel, const char* x, const RowLayout& layout, int p, T eps,
                      Tensor& out, T* norms) {
  const int64_t n = layout.length, item = kernel.item;
  char* y = static_cast<char*>(out.mutable_data_ptr());
  for_column_blocks(layout, out, [&](const ColumnBlock& block) {
    const char* from = x + block.offset * item;
    char* to = y + block.offset * item;
    T sums[kColumns], factor[kColumns];
    kernel.column_sums(from, nullptr, n, layout.inner, block.columns, p, sums);
    for (int64_t c = 0; c < block.columns; ++c) {
      norms[block.row + c] = math::norm_value(p, sums[c], eps);
      factor[c] = T(1) / norms[block.row + c];
    }
    kernel.column_scale(from, n, layout.inner, block.columns, factor, to);
    for (int64_t c = 0; c < block.columns; ++c) {  // few, if any: one by one, as rows
      if (!math::norm_needs_rescue(p, sums[c], eps)) continue;
      std::vector<char> row(size_t(2 * n * item));
      copy_strided(from + c * item, layout.inner, row.data(), 1, n, item);
      kernel.normalize(row.data(), 1, n, p, eps, row.data() + n * item, norms + block.row + c, false);
      copy_strided(row.data() + n * item, 1, to + c * item, layout.inner, n, item);
    }
  });
}

template <class T>
void forward(const Tensor& x, const RowLayout& layout, int64_t p, double eps, Tensor& y, Tensor& norm) {
  const StoredRows<T>& kernel = stored_rows<T>(x.scalar_type());
  T* norms = static_cast<T*>(norm.mutable_data_ptr());
  if (layout.inner != 1) return forward_channels<T>(kernel, bytes(x), layout, int(p), T(eps), y, norms);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const int64_t row_bytes = layout.length * kernel.item;
  const bool past_caches = goes_past_caches(y);
  for_row_blocks(layout, row_bytes, y, [&](int64_t first, int64_t rows) {
    kernel.normalize(bytes(x) + first * row_bytes, rows, layout.length, int(p), T(eps),
                     out + first * row_bytes, norms + first, past_caches);
  });
}

template <class T>
void backward_channels(const StoredRows<T>& kernel, const char* grad_y, const T* grad_norms, const char* x,
                       const T* norms, const RowLayout& layout, int p, T eps, Tensor& out) {
  const int64_t n = layout.length, item = kernel.item;
  char* dx = static_cast<char*>(out.mutable_data_ptr());
  for_column_blocks(layout, out, [&](const ColumnBlock& block) {
    const char* from = x + block.offset * item;
    const char* g = grad_y != nullptr ? grad_y + block.offset * item : nullptr;
    T inverse[kColumns], along[kColumns] = {}, g_norm[kColumns], bound[kColumns];
    if (g != nullptr) kernel.column_sums(from, g, n, layout.inner, block.columns, p, along);
    for (int64_t c = 0; c < block.columns; ++c) {
      const T norm = norms[block.row + c];
      inverse[c] = T(1) / norm;
      along[c] *= inverse[c];
      g_norm[c] = grad_norms != nullptr ? grad_norms[block.row + c] : T(0);
      bound[c] = math::ruled_by_eps(p, norm, eps) ? kernel.largest_gradient : T(INFINITY);
    }
    char* to = dx + block.offset * item;
    kernel.column_vjp(from, g, n, layout.inner, block.columns, p, inverse, along, g_norm, bound, to);
    for (int64_t c = 0; c < block.columns; ++c) {  // few, if any: one by one, as rows
      if (math::norm_is_moderate(norms[block.row + c])) continue;
      std::vector<char> rows(size_t(3 * n * item));
      char *own = rows.data(), *upstream = own + n * item, *result = upstream + n * item;
      copy_strided(from + c * item, layout.inner, own, 1, n, item);
      if (g != nullptr) copy_strided(g + c * item, layout.inner, upstream, 1, n, item);
      kernel.vjp(own, g != nullptr ? upstream : nullptr, 1, n, p, eps, norms + block.row + c, g_norm + c,
                 result, false);
      copy_strided(result, 1, to + c * item, layout.inner, n, item);
    }
  });
}

template <class T>
void backward(const std::optional<Tensor>& grad_y, const std::optional<Tensor>& grad_norm, const Tensor& x,
              const Tensor& norm, const RowLayout& layout, int64_t p, double eps, Tensor& dx) {
  const StoredRows<T>& kernel = stored_rows<T>(x.scalar_type());
  const T* norms = static_cast<const T*>(norm.const_data_ptr());
  const T* grad_norms = grad_norm ? static_cast<const T*>(grad_norm->const_data_ptr()) : nullptr;
  const char* g = grad_y ? bytes(*grad_y) : nullptr;
  if (layout.inner != 1)
    return backward_channels<T>(kernel, g, grad_norms, bytes(x), norms, layout, int(p), T(eps), dx);
  char* out = static_cast<char*>(dx.mutable_data_ptr());
  const int64_t row_bytes = layout.length * kernel.item;
  const bool past_caches = goes_past_caches(dx);
  for_row_blocks(layout, row_bytes, dx, [&](int64_t first, int64_t rows) {
    kernel.vjp(bytes(x) + first * row_bytes, g != nullptr ? g + first * row_bytes : nullptr, rows,
               layout.length, int(p), T(eps), norms + first,
               grad_norms != nullptr ? grad_norms + first : nullptr, out + first * row_bytes, past_caches);
  });
}

std::tuple<Tensor, Tensor> normalize(const NormalizeArguments& in) {
  const Tensor& x = in.x;
  check_normalize(in.kName, x, in.p);
  const RowLayout layout = row_layout(in.kName, x, in.dim);
  std::vector<int64_t> norm_sizes(x.sizes().begin(), x.sizes().end());
  norm_sizes[size_t(in.dim)] = 1;
  const ScalarType wide = accumulator(x.scalar_type());
  Tensor y = fresh_like(x), norm = fresh(norm_sizes, wide);
  if (wide == ScalarType::Double)
    forward<double>(x, layout, in.p, in.eps, y, norm);
  else
    forward<float>(x, layout, in.p, in.eps, y, norm);
  return {y, norm};
}

Tensor normalize_backward(const NormalizeBackwardArguments& in) {
  const Tensor& x = in.x;
  check_normalize(in.kName, x, in.p);
  const RowLayout layout = row_layout(in.kName, x, in.dim);
  Tensor dx = fresh_like(x);
  if (accumulator(x.scalar_type()) == ScalarType::Double)
    backward<double>(in.grad_y, in.grad_norm, x, in.norm, layout, in.p, in.eps, dx);
  else
    backward<float>(in.grad_y, in.grad_norm, x, in.norm, layout, in.p, in.eps, dx);
  return dx;
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::cpu::normalize>(m);
  nf::implement<&nf::cpu::normalize_backward>(m);
}
