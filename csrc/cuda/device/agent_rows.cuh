// What agent_hinge.cu and cosine_pairs.cu share: a warp per row, and the gradients they write.
#pragma once

#include "cuda/device/reduce.cuh"
#include "cuda/device/row_scale.cuh"
#include "cuda/device/stored.cuh"
#include "cuda/products/cublas.h"
#include "math/normalize.h"

namespace nf {

constexpr int kRowThreads = 256;

inline Grid thread_per(int64_t count) { return {(count + kRowThreads - 1) / kRowThreads}; }

inline Grid warp_per_row(int64_t rows) {
  constexpr int kRows = kRowThreads / kWarp;
  return {(rows + kRows - 1) / kRows};
}

// out[r] = (g - y <y, g>) / ||own[r]||, y = own[r] / ||own[r]||, for g(d) = `gradient(d)`; `scale`
// is that of the row. One warp.
template <class T, class Gradient>
NF_DEVICE void project_row(const StoredArray& own, int64_t r, int64_t dim, double eps,
                           const math::RowScale<T>& scale, const Gradient& gradient, const StoredArray& out) {
  const auto unit = [&](int64_t d) { return own.load<T>(r * dim + d) * scale.outer * scale.inner; };
  T radial = 0;
  for (int64_t d = lane_id(); d < dim; d += kWarp) radial += unit(d) * gradient(d);
  radial = warp_sum(radial);
  for (int64_t d = lane_id(); d < dim; d += kWarp) {
    T g = math::normalize_vjp<T>(gradient(d), unit(d), radial, scale.outer, scale.inner, T(0));
    if constexpr (!std::is_same_v<T, double>)
      if (out.type == int(ScalarType::Half)) g = held_finite<Half>(g, scale.norm, T(eps), 2);
    out.store<T>(r * dim + d, g);
  }
}

// Where a gradient of the shape [rows, D] of `t` will be written, in zeros or uninitialised; empty where
// it was not asked for.
inline Tensor gradient_like(const Tensor& t, bool needed, bool zero) {
  if (!needed) return device_empty(t, {0}, t.scalar_type());
  return zero ? torch::stable::new_zeros(t, {t.size(0), t.size(1)}) : torch::stable::empty_like(t);
}

// The same for the features: a shard's part is added to others before it is rounded.
inline Tensor partial_gradient_like(const Tensor& x, bool needed, bool is_shard, bool zero) {
  if (!needed || !is_shard) return gradient_like(x, needed, zero);
  const ScalarType wide = accumulator(x.scalar_type());
  return zero ? torch::stable::new_zeros(x, {x.size(0), x.size(1)}, wide)
              : device_empty(x, {x.size(0), x.size(1)}, wide);
}

}  // namespace nf
