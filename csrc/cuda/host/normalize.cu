// normalize and its backward on CUDA. Contiguous rows: some to a warp (rows.cu and below). A channel
// axis: a block owns kColumns neighbouring positions of one outer index, 32 to a warp so that every
// access is coalesced, and its warps share the channels.
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "cuda/device/rows.cuh"
#include "engine/cosine_arguments.h"
#include "engine/row_layout.h"

namespace nf {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = kWarp;
constexpr int kGroups = 8;  // warps that share the channels of a block's columns
constexpr int kChannelThreads = kColumns * kGroups;

template <class S, class Shape>
NF_KERNEL_RESIDENT(kThreads, (kResidentOf<Shape, kThreads, 2>))
normalize_rows_backward_kernel(const S* __restrict__ grad_y,              // [rows, length] or null
                               const accum_t<S>* __restrict__ grad_norm,  // [rows] or null
                               const S* __restrict__ x,                   // [rows, length]
                               const accum_t<S>* __restrict__ norm,       // [rows]
                               int64_t rows, int64_t length, int p, accum_t<S> eps,
                               S* __restrict__ dx)  // [rows, length]
{
  using T = accum_t<S>;
  constexpr int kRows = Shape::kRows;
  using Held = Vector<S, Shape::kVec>;
  const WarpPlace<Shape> place((block_id() * kWarps + warp_id()) * kRows, rows);
  if (!place.has(0)) return;  // the whole warp leaves
  const int64_t first = place.first * length;
  T row_norm[kRows], g_norm[kRows], dot[kRows];
  math::RowScale<T> scale[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = place.first + (place.has(r) ? r : 0);
    row_norm[r] = norm[row];
    g_norm[r] = grad_norm != nullptr ? grad_norm[row] : T(0);
  }
  const WarpRows<S, Shape> own(x + first, length, place);
  // Where y has no gradient something is read all the same, and taken for zero.
  const WarpRows<S, Shape> upstream((grad_y != nullptr ? grad_y : x) + first, length, place);
  const auto taken = [&](S g) { return grad_y != nullptr ? T(g) : T(0); };
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    scale[r] = scale_again(own, r, p, eps, T(1) / row_norm[r]);
    dot[r] = 0;
    own.each_with(r, upstream, [&](int64_t, const Held& v, const Held& g) {
#pragma unroll
      for (int e = 0; e < Shape::kVec; ++e)
        dot[r] += T(v.at[e]) * scale[r].outer * scale[r].inner * taken(g.at[e]);
    });
  }
  warp_sums(dot);
  with_power(p, [&](auto power) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      own.each_with(r, upstream, [&](int64_t at, const Held& v, const Held& g) {
        Held d;
#pragma unroll
        for (int e = 0; e < Shape::kVec; ++e) {
          const T value = T(v.at[e]);
          const T slope = math::norm_slope<T>(power, value, value * scale[r].outer * scale[r].inner);
          const T plain = math::normalize_vjp<T>(taken(g.at[e]), slope, dot[r], scale[r].outer,
                                                 scale[r].inner, g_norm[r]);
          d.at[e] = S(held_finite<S>(plain, row_norm[r], eps, power));
        }
        store_vector<Shape::kVec>(dx + first + r * length + at, d);
      });
  });
}

// Where a thread of a channel kernel stands: position `column` of outer index `outer`, and the first of
// every kGroups-th channel.
struct ChannelThread {
  int64_t outer;
  int64_t column;
  int64_t first;  // offset of channel 0
  bool active;

  NF_DEVICE ChannelThread(int64_t length, int64_t inner) {
    const int64_t blocks = (inner + kColumns - 1) / kColumns;
    outer = block_id() / blocks;
    column = block_id() % blocks * kColumns + lane_id();
    first = outer * length * inner + column;
    active = column < inner;
  }
};

// Adds over the block's warps what each lane holds for its column; every warp gets the sums.
template <class T>
NF_DEVICE T sum_over_groups(T value, T* scratch) {
  sync_block();  // an earlier call's reads of scratch, before this one's writes
  scratch[warp_id() * kColumns + lane_id()] = value;
  sync_block();  // the writes above, before the reads below
  T total = 0;
  for (int g = 0; g < kGroups; ++g) total += scratch[g * kColumns + lane_id()];
  return total;
}

// How a column is scaled. All threads of the block: the sums need them, so a block rescues together.
template <class S>
NF_DEVICE math::RowScale<accum_t<S>> channel_scale(const ChannelThread& me, const S* x, int64_t length,
                                                   int64_t inner, int p, accum_t<S> eps,
                                                   accum_t<S>* scratch) {
  using T = accum_t<S>;
  const auto sum = [&](T factor) {
    T total = 0;
    if (me.active)
      for (int64_t c = warp_id(); c < length; c += kGroups)
        total += math::norm_term<T>(p, T(x[me.first + c * inner]) * factor);
    return sum_over_groups(total, scratch);
  };
  const T plain = sum(T(1)), tamer = me.active ? math::norm_tamer(p, plain, eps) : T(1);
  const bool rescue = sum_over_groups(warp_any(tamer != T(1)) ? T(1) : T(0), scratch) > 0;
  return math::row_scale(p, eps, tamer, rescue ? sum(tamer) : plain);
}

template <class S>
NF_KERNEL(kChannelThreads)
normalize_channels_kernel(const S* __restrict__ x,  // [outer, length, inner]
                          int64_t length, int64_t inner, int p, accum_t<S> eps,
                          S* __restrict__ y,              // [outer, length, inner]
                          accum_t<S>* __restrict__ norm)  // [outer, inner]
{
  using T = accum_t<S>;
  SharedMemory shared;
  T* scratch = shared.take<T>(kChannelThreads);
  const ChannelThread me(length, inner);
  const math::RowScale<T> scale = channel_scale(me, x, length, inner, p, eps, scratch);
  if (!me.active) return;
  for (int64_t c = warp_id(); c < length; c += kGroups) {
    const int64_t at = me.first + c * inner;
    y[at] = S(T(x[at]) * scale.outer * scale.inner);
  }
  if (warp_id() == 0) norm[me.outer * inner + me.column] = scale.norm;
}

template <class S>
NF_KERNEL(kChannelThreads)
normalize_channels_backward_kernel(const S* __restrict__ grad_y,  // [outer, length, inner] or null
                                   const accum_t<S>* __restrict__ grad_norm,  // [outer, inner] or null
                                   const S* __restrict__ x,                   // [outer, length, inner]
                                   const accum_t<S>* __restrict__ norm,       // [outer, inner]
                                   int64_t length, int64_t inner, int p, accum_t<S> eps,
                                   S* __restrict__ dx)  // [outer, length, inner]
{
  using T = accum_t<S>;
  SharedMemory shared;
  T* scratch = shared.take<T>(kChannelThreads);
  const ChannelThread me(length, inner);
  const int64_t row = me.outer * inner + me.column;
  const T row_norm = me.active ? norm[row] : T(1);
  math::RowScale<T> scale{T(1) / row_norm, T(1), row_norm};
  const bool serves = math::inverse_serves(scale.outer);
  if (sum_over_groups(warp_any(!serves) ? T(1) : T(0), scratch) > 0) {  // the same for the whole block
    const math::RowScale<T> anew = channel_scale(me, x, length, inner, p, eps, scratch);
    if (!serves) scale = anew;
  }
  const T g_norm = me.active && grad_norm != nullptr ? grad_norm[row] : T(0);
  T dot = 0;
  if (me.active && grad_y != nullptr)
    for (int64_t c = warp_id(); c < length; c += kGroups) {
      const int64_t at = me.first + c * inner;
      dot += T(x[at]) * scale.outer * scale.inner * T(grad_y[at]);
    }
  dot = sum_over_groups(dot, scratch);
  if (!me.active) return;
  for (int64_t c = warp_id(); c < length; c += kGroups) {
    const int64_t at = me.first + c * inner;
    const T value = T(x[at]), g = grad_y != nullptr ? T(grad_y[at]) : T(0);
    const T slope = math::norm_slope<T>(p, value, value * scale.outer * scale.inner);
    const T plain = math::normalize_vjp<T>(g, slope, dot, scale.outer, scale.inner, g_norm);
    dx[at] = S(held_finite<S>(plain, row_norm, eps, p));
  }
}

Grid channel_grid(const RowLayout& layout) {
  return {layout.outer * ((layout.inner + kColumns - 1) / kColumns)};
}

std::tuple<Tensor, Tensor> normalize(const NormalizeArguments& in) {
  const Tensor& x = in.x;
  check_normalize(in.kName, x, in.p);
  Queue queue(x);
  const RowLayout layout = row_layout(in.kName, x, in.dim);
  std::vector<int64_t> norm_sizes(x.sizes().begin(), x.sizes().end());
  norm_sizes[size_t(in.dim)] = 1;
  Tensor y = torch::stable::empty_like(x);
  Tensor norm = torch::stable::empty(norm_sizes, accumulator(x.scalar_type()), {}, x.device());
  if (layout.inner == 1) {
    UnitRows task{x.const_data_ptr(), x.scalar_type(), layout.outer, layout.length, int(in.p), in.eps};
    task.y = y.mutable_data_ptr();
    task.y_type = x.scalar_type();
    task.norm = norm.mutable_data_ptr();
    unit_rows(queue, task);
    return {y, norm};
  }
  dispatch_stored(x.scalar_type(), [&]<class S>() {
    using T = accum_t<S>;
    launch("normalize_channels", queue, normalize_channels_kernel<S>, channel_grid(layout), kChannelThreads,
           shared_bytes<T>(kChannelThreads), static_cast<const S*>(x.const_data_ptr()), layout.length,
           layout.inner, int(in.p), T(in.eps), static_cast<S*>(y.mutable_data_ptr()),
           static_cast<T*>(norm.mutable_data_ptr()));
  });
  return {y, norm};
}

Tensor normalize_backward(const NormalizeBackwardArguments& in) {
  const Tensor& x = in.x;
  check_normalize(in.kName, x, in.p);
  Queue queue(x);
  const RowLayout layout = row_layout(in.kName, x, in.dim);
  Tensor dx = torch::stable::empty_like(x);
  dispatch_stored(x.scalar_type(), [&]<class S>() {
    using T = accum_t<S>;
    const S* g = in.grad_y ? static_cast<const S*>(in.grad_y->const_data_ptr()) : nullptr;
    const T* g_norm = in.grad_norm ? static_cast<const T*>(in.grad_norm->const_data_ptr()) : nullptr;
    const S* from = static_cast<const S*>(x.const_data_ptr());
    const T* norms = static_cast<const T*>(in.norm.const_data_ptr());
    S* to = static_cast<S*>(dx.mutable_data_ptr());
    if (layout.inner == 1) {
      const bool aligned =
          layout.length % kVectorOf<S> == 0 && aligned16(g) && aligned16(from) && aligned16(to);
      dispatch_rows<kVectorOf<S>>(aligned, layout.length, [&]<class Shape>() {
        constexpr int kRowsPerBlock = kWarps * Shape::kRows;
        launch("normalize_rows_backward", queue, normalize_rows_backward_kernel<S, Shape>,
               Grid{(layout.outer + kRowsPerBlock - 1) / kRowsPerBlock}, kThreads, 0, g, g_norm, from, norms,
               layout.outer, layout.length, int(in.p), T(in.eps), to);
      });
    } else {
      launch("normalize_channels_backward", queue, normalize_channels_backward_kernel<S>,
             channel_grid(layout), kChannelThreads, shared_bytes<T>(kChannelThreads), g, g_norm, from, norms,
             layout.length, layout.inner, int(in.p), T(in.eps), to);
    }
  });
  return dx;
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  nf::implement<&nf::normalize>(m);
  nf::implement<&nf::normalize_backward>(m);
}
