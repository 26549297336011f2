// How a stored row was scaled, from the 1 / n that was saved of it: csrc/math/normalize.h says where that
// number says it all; elsewhere the row is summed anew.
#pragma once

#include "cuda/device/row_access.cuh"

namespace nf {

// sum of (factor x)^2 over row r. One warp.
template <class T>
NF_DEVICE T sum_of_squares(const StoredArray& rows, int64_t r, int64_t dim, T factor) {
  T total = 0;
#pragma unroll 1  // seldom run: its registers matter, not its speed
  for (int64_t d = lane_id(); d < dim; d += kWarp) {
    const T v = rows.load<T>(r * dim + d) * factor;
    total += v * v;
  }
  return warp_sum(total);
}

// Of row r. One warp, all of its lanes.
template <class T>
NF_DEVICE math::RowScale<T> scale_again(const StoredArray& rows, int64_t r, int64_t dim, T eps, T inverse) {
  if (math::inverse_serves(inverse)) return {inverse, T(1), T(1) / inverse};
  const T plain = sum_of_squares(rows, r, dim, T(1)), tamer = math::norm_tamer(2, plain, eps);
  return math::row_scale(2, eps, tamer, tamer == T(1) ? plain : sum_of_squares(rows, r, dim, tamer));
}

// The same of a feature row, whose 1 / n is saved in double: there every row of a narrower type has one.
template <class T>
NF_DEVICE math::RowScale<double> feature_scale_again(const StoredArray& x, int64_t i, int64_t dim, double eps,
                                                     double inverse) {
  if constexpr (std::is_same_v<T, double>)
    return scale_again(x, i, dim, eps, inverse);
  else
    return {inverse, 1.0, 1.0 / inverse};
}

}  // namespace nf
