// The gradient of a row from that of its unit row.
#pragma once

#include "cuda/device/row_scale.cuh"
#include "math/normalize.h"

namespace nf {

// out[r] = (g - y <y, g>) / ||own[r]||, y = own[r] / ||own[r]||, for g(d) = `gradient(d)`; `scale` is that of
// the row. One warp.
template <class T, class Gradient>
NF_DEVICE void project_row(const StoredArray& own, int64_t r, int64_t dim, double eps,
                           const math::RowScale<T>& scale, const Gradient& gradient, const StoredArray& out) {
  const auto unit = [&](int64_t d) { return own.load<T>(r * dim + d) * scale.outer * scale.inner; };
  T radial = 0;
  for (int64_t d = lane_id(); d < dim; d += kWarp) radial += unit(d) * gradient(d);
  radial = warp_sum(radial);
  for (int64_t d = lane_id(); d < dim; d += kWarp) {
    T g = math::normalize_vjp<T>(gradient(d), unit(d), radial, scale.outer, scale.inner, T(0));
    if (out.type == int(ScalarType::Half)) g = held_finite<Half>(g, scale.norm, T(eps), 2);
    out.store<T>(r * dim + d, g);
  }
}

// What a row that does not count gets, whatever it holds, NaN included. One warp.
template <class T>
NF_DEVICE void clear_row(int64_t r, int64_t dim, const StoredArray& out) {
  for (int64_t d = lane_id(); d < dim; d += kWarp) out.store<T>(r * dim + d, T(0));
}

}  // namespace nf
