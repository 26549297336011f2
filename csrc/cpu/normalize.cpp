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

// Whether `tensors` like `out`, all that a call touches, have no room in the last caches together: whoever reads
// `out` next would hardly find it there. Rows of 16-bit numbers, whose conversions cost more than their traffic, were
// not faster so.
bool goes_past_caches(const Tensor& out, int64_t tensors, const NewPages& pages) {
  constexpr int64_t kSmallest = int64_t(1) << 22;  // below, nobody needs to know the machine
  const int64_t item = int64_t(out.element_size()), bytes = tensors * out.numel() * item;
  return item >= 4 && bytes > kSmallest && bytes > last_cache_bytes() && !pages.found();
}

// Calls body(block, past_caches) for blocks of columns of a channel axis, whose part of `out`, one of `tensors` in
// the call, has its pages by then.
template <class Body>
void for_column_blocks(const RowLayout& layout, int64_t tensors, const Tensor& out, const Body& body) {
  const NewPages pages(out);
  const bool past_caches = goes_past_caches(out, tensors, pages);
  char* place = static_cast<char*>(out.mutable_data_ptr());
  const int64_t item = int64_t(out.element_size());
  const int64_t blocks = (layout.inner + kColumns - 1) / kColumns;
  for_rows(layout.outer * blocks, layout.length * std::min(layout.inner, kColumns), [&](int64_t i) {
    const int64_t outer = i / blocks, first = i % blocks * kColumns;
    const ColumnBlock block{outer * layout.inner + first, std::min(kColumns, layout.inner - first),
                            outer * layout.length * layout.inner + first};
    if (blocks == 1)  // else its pages are its neighbours' as well
      pages.ask_for(place + block.offset * item, layout.length * layout.inner * item);
    body(block, past_caches);
  });
}

// Whole channels lie one after the other: `join` of them are one long channel with `join` columns for each. A few
// numbers to a channel, or not a multiple of a vector, would leave most of the work to single elements.
struct Joined {
  int64_t join;
  int64_t channels;  // long ones
  int64_t rest;      // channels that are left over

  explicit Joined(const RowLayout& layout) : join(1) {
    constexpr int64_t kVector = 16, kLong = 256, kLeast = 8;
    while ((layout.inner * join % kVector != 0 || layout.inner * join < kLong) &&
           2 * join * layout.inner <= kColumns && layout.length / (2 * join) >= kLeast)
      join *= 2;
    channels = layout.length / join, rest = layout.length % join;
  }

  // A number of every column, for every one of its columns.
  template <class T>
  void repeat(T* numbers, int64_t columns) const {
    for (int64_t k = 1; k < join; ++k) std::copy_n(numbers, columns, numbers + k * columns);
  }
};

template <class T>
void sum_columns(const StoredRows<T>& kernel, const Joined& joined, const char* x, const char* g,
                 int64_t stride, int64_t columns, int p, T* sums) {
  alignas(64) T long_sums[kColumns];
  kernel.column_sums(x, g, joined.channels, joined.join * stride, joined.join * columns, p, long_sums);
  std::copy_n(long_sums, columns, sums);
  for (int64_t k = 1; k < joined.join; ++k)
    for (int64_t c = 0; c < columns; ++c) sums[c] += long_sums[k * columns + c];
  if (joined.rest == 0) return;
  const int64_t done = joined.channels * joined.join * stride * kernel.item;
  kernel.column_sums(x + done, g != nullptr ? g + done : nullptr, joined.rest, stride, columns, p, long_sums);
  for (int64_t c = 0; c < columns; ++c) sums[c] += long_sums[c];
}

// Calls body(channels, stride, columns, offset in bytes) for the long channels and for those that are left over.
template <class Body>
void for_joined(const Joined& joined, int64_t stride, int64_t columns, int64_t item, const Body& body) {
  body(joined.channels, joined.join * stride, joined.join * columns, int64_t(0));
  if (joined.rest > 0) body(joined.rest, stride, columns, joined.channels * joined.join * stride * item);
}

// A column gathered into a contiguous row, or a row scattered back into its column.
void copy_strided(const char* from, int64_t from_stride, char* to, int64_t to_stride, int64_t count,
                  int64_t item) {
  for (int64_t d = 0; d < count; ++d)
    std::memcpy(to + d * to_stride * item, from + d * from_stride * item, item);
}

const char* bytes(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

// Calls body(first, rows, past_caches) for blocks of contiguous rows, likewise.
template <class Body>
void for_row_blocks(const RowLayout& layout, int64_t row_bytes, int64_t tensors, const Tensor& out,
                    const Body& body) {
  constexpr int64_t kBlockBytes = int64_t(1) << 18;  // new pages are still in L2 when their rows come
  const NewPages pages(out);
  const bool past_caches = goes_past_caches(out, tensors, pages);
  char* place = static_cast<char*>(out.mutable_data_ptr());
  const int64_t block = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, row_bytes));
  for_row_runs(layout.outer, layout.length, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += block) {
      const int64_t rows = std::min(block, end - first);
      pages.ask_for(place + first * row_bytes, rows * row_bytes);
      body(first, rows, past_caches);
    }
  });
}

template <class T>
void forward_channels(const StoredRows<T>& kernel, const char* x, const RowLayout& layout, int p, T eps,
                      Tensor& out, T* norms) {
  const int64_t n = layout.length, item = kernel.item;
  char* y = static_cast<char*>(out.mutable_data_ptr());
  const Joined joined(layout);
  for_column_blocks(layout, 2, out, [&](const ColumnBlock& block, bool past_caches) {
    const char* from = x + block.offset * item;
    char* to = y + block.offset * item;
    alignas(64) T sums[kColumns], factor[kColumns];
    sum_columns<T>(kernel, joined, from, nullptr, layout.inner, block.columns, p, sums);
    for (int64_t c = 0; c < block.columns; ++c) {
      norms[block.row + c] = math::norm_value(p, sums[c], eps);
      factor[c] = T(1) / norms[block.row + c];
    }
    joined.repeat(factor, block.columns);
    for_joined(joined, layout.inner, block.columns, item,
               [&](int64_t channels, int64_t stride, int64_t columns, int64_t at) {
                 kernel.column_scale(from + at, channels, stride, columns, factor, to + at, past_caches);
               });
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
  for_row_blocks(layout, row_bytes, 2, y, [&](int64_t first, int64_t rows, bool past_caches) {
    kernel.normalize(bytes(x) + first * row_bytes, rows, layout.length, int(p), T(eps),
                     out + first * row_bytes, norms + first, past_caches);
  });
}

template <class T>
void backward_channels(const StoredRows<T>& kernel, const char* grad_y, const T* grad_norms, const char* x,
                       const T* norms, const RowLayout& layout, int p, T eps, Tensor& out) {
  const int64_t n = layout.length, item = kernel.item;
  char* dx = static_cast<char*>(out.mutable_data_ptr());
  const Joined joined(layout);
  for_column_blocks(layout, 3, out, [&](const ColumnBlock& block, bool past_caches) {
    const char* from = x + block.offset * item;
    const char* g = grad_y != nullptr ? grad_y + block.offset * item : nullptr;
    ColumnNumbers<T> of;
    if (g != nullptr)
      sum_columns<T>(kernel, joined, from, g, layout.inner, block.columns, p, of.along);
    else
      std::fill_n(of.along, block.columns, T(0));
    for (int64_t c = 0; c < block.columns; ++c) {
      const T norm = norms[block.row + c];
      of.inverse_norm[c] = T(1) / norm;
      of.along[c] *= of.inverse_norm[c];
      of.g_norm[c] = grad_norms != nullptr ? grad_norms[block.row + c] : T(0);
      of.bound[c] = math::ruled_by_eps(p, norm, eps) ? kernel.largest_gradient : T(INFINITY);
    }
    for (T* numbers : {of.inverse_norm, of.along, of.g_norm, of.bound}) joined.repeat(numbers, block.columns);
    char* to = dx + block.offset * item;
    for_joined(joined, layout.inner, block.columns, item,
               [&](int64_t channels, int64_t stride, int64_t columns, int64_t at) {
                 kernel.column_vjp(from + at, g != nullptr ? g + at : nullptr, channels, stride, columns, p,
                                   of, to + at, past_caches);
               });
    for (int64_t c = 0; c < block.columns; ++c) {  // few, if any: one by one, as rows
      if (math::norm_is_moderate(norms[block.row + c])) continue;
      std::vector<char> rows(size_t(3 * n * item));
      char *own = rows.data(), *upstream = own + n * item, *result = upstream + n * item;
      copy_strided(from + c * item, layout.inner, own, 1, n, item);
      if (g != nullptr) copy_strided(g + c * item, layout.inner, upstream, 1, n, item);
      kernel.vjp(own, g != nullptr ? upstream : nullptr, 1, n, p, eps, norms + block.row + c, of.g_norm + c,
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
  for_row_blocks(layout, row_bytes, 3, dx, [&](int64_t first, int64_t rows, bool past_caches) {
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
