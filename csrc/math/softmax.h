// The scaled softmax of one row (NormFace section 3.2), target column apart from the others.
//   E_j = exp(s c_j - kappa), j != y      S = sum E_j      A = sum E_j c_j      z = s psi(c_y)
//   t = ln S + kappa - z      loss = softplus(t)      q = 1 - p_y = sigmoid(t)
// S and A add over tiles, threads and machines. Nothing here subtracts p from 1.
#pragma once

#include "math/host_device.h"

namespace nf::math {

// Where exp() neither flushes a term to zero nor lets the sum of C of them overflow.
template <class T>
struct ExpRange {
  static constexpr double kLow = std::is_same_v<T, double> ? 708.0 : 87.3;
  static constexpr double kHigh = std::is_same_v<T, double> ? 709.0 : 88.7;
};

// Cosines are bounded, so one kappa = s c0 serves every row while
//   s (1 + c0) <= kLow   and   s (1 - c0) + ln C <= kHigh.
template <class T>
NF_HD bool has_fixed_shift(double scale, double classes) {
  return 2.0 * std::fabs(scale) + std::log(classes) <= ExpRange<T>::kLow + ExpRange<T>::kHigh;
}

template <class T>
NF_HD double fixed_shift(double scale, double classes) {
  const double s = std::fabs(scale);
  const double lowest = s + std::log(classes) - ExpRange<T>::kHigh;
  const double highest = ExpRange<T>::kLow - s;
  const double preferred = 0.3 * s;
  return preferred < lowest ? lowest : preferred > highest ? highest : preferred;
}

struct RowLoss {
  double loss;
  double q;       // 1 - p_y
  double weight;  // p_j = E_j * weight; q / S, and 0 where there is no other class
};

NF_HD RowLoss softmax_row(double sum, double kappa, double target_logit) {
  const double t = std::log(sum) + kappa - target_logit;
  const double e = std::exp(t > 0 ? -t : t);
  const double loss = (t > 0 ? t : 0.0) + std::log1p(e);
  const double q = t > 0 ? 1.0 / (1.0 + e) : e / (1.0 + e);
  return {loss, q, sum > 0 ? q / sum : sum};
}

// d loss / ds = (sum_j p_j c_j) - q psi
NF_HD double softmax_scale_slope(const RowLoss& row, double sum_cosine, double psi) {
  return row.weight * sum_cosine - row.q * psi;
}

}  // namespace nf::math
