// The norms and the cosine of two stored rows to the last digits: products and sums in double, from the raw
// rows. Squares of float64 rows may leave the range of double; math/normalize.h tames such a row.
#pragma once

#include "cuda/device/row_scale.cuh"

namespace nf {

struct RowCosine {
  math::RowScale<double> x;
  double cosine;  // 0 where there is no other row
};

// Of row i of x and, where j >= 0, row j of w. One warp; every lane gets the same.
NF_DEVICE RowCosine row_cosine(const StoredArray& x, int64_t i, const StoredArray& w, int64_t j, int64_t dim,
                               double eps) {
  double xx = 0, ww = 0, xw = 0;
  for (int64_t d = lane_id(); d < dim; d += kWarp) {
    const double a = x.load<double>(i * dim + d), b = j >= 0 ? w.load<double>(j * dim + d) : 0.0;
    xx += a * a;
    ww += b * b;
    xw += a * b;
  }
  xx = warp_sum(xx), ww = warp_sum(ww), xw = warp_sum(xw);
  const double x_tamer = math::norm_tamer(2, xx, eps);
  if (x_tamer != 1.0) xx = sum_of_squares(x, i, dim, x_tamer);
  const math::RowScale<double> of_x = math::row_scale(2, eps, x_tamer, xx);
  if (j < 0) return {of_x, 0.0};
  const double w_tamer = math::norm_tamer(2, ww, eps);
  if (w_tamer != 1.0) ww = sum_of_squares(w, j, dim, w_tamer);
  const math::RowScale<double> of_w = math::row_scale(2, eps, w_tamer, ww);
  if (x_tamer == 1.0 && w_tamer == 1.0) return {of_x, xw / of_x.norm / of_w.norm};
  xw = 0;
#pragma unroll 1
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    xw += x.load<double>(i * dim + d) * x_tamer * (w.load<double>(j * dim + d) * w_tamer);
  return {of_x, warp_sum(xw) * of_x.inner * of_w.inner};
}

}  // namespace nf
