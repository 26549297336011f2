// The norms and the cosine of two stored rows to the last digits: products and sums in double, from the raw
// rows. Squares of float64 rows may leave the range of double; such a row is divided by its largest entry.
#pragma once

#include "row_access.cuh"

namespace nf {

// Row r as the factors of its unit row, from the sum of its squares. One warp.
NF_DEVICE RowScale<double> scale_from_squares(const StoredArray& rows, int64_t r, int64_t dim, double squares,
                                              double eps) {
  const auto sum = [&](double factor) {
    if (factor == 1.0) return squares;
    double total = 0;
    for (int64_t d = lane_id(); d < dim; d += kWarp) {
      const double v = rows.load<double>(r * dim + d) * factor;
      total += v * v;
    }
    return warp_sum(total);
  };
  const auto largest = [&] {
    double top = 0;
    for (int64_t d = lane_id(); d < dim; d += kWarp) {
      const double magnitude = std::fabs(rows.load<double>(r * dim + d));
      top = magnitude > top ? magnitude : top;
    }
    return warp_largest(top);
  };
  return row_scale<double>(2, eps, sum, largest);
}

struct RowCosine {
  RowScale<double> x;
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
  const RowScale<double> of_x = scale_from_squares(x, i, dim, xx, eps);
  if (j < 0) return {of_x, 0.0};
  const RowScale<double> of_w = scale_from_squares(w, j, dim, ww, eps);
  if (!math::norm_needs_rescue(2, xx, eps) && !math::norm_needs_rescue(2, ww, eps))
    return {of_x, xw / of_x.norm / of_w.norm};
  xw = 0;
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    xw += x.load<double>(i * dim + d) * of_x.outer * of_x.inner *
          (w.load<double>(j * dim + d) * of_w.outer * of_w.inner);
  return {of_x, warp_sum(xw)};
}

}  // namespace nf
