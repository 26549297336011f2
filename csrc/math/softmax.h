// The scaled softmax of one row (NormFace section 3.2), target column apart from the others.
//   E_j = exp(s c_j - kappa), j != y      S = sum E_j      A = sum E_j c_j      z = s psi(c_y)
//   t = ln S + kappa - z      -log p_y = softplus(t)      q = 1 - p_y = sigmoid(t)
// S and A add over tiles, threads and machines. Nothing here subtracts p from 1.
#pragma once

#include "math/host_device.h"

namespace nf::math {

// What the exponent of E may be: below -kLow the factor s / S of the gradients would overflow long before
// E is flushed to zero (e^-87.3 in float32), above kHigh the sum of C terms does.
template <class T>
struct ExpRange {
  static constexpr double kLow = std::is_same_v<T, double> ? 690.0 : 80.0;
  static constexpr double kHigh = std::is_same_v<T, double> ? 709.0 : 88.7;
};

// Logits s f(c) are bounded by the range [lowest, highest] of f, which is [-1, 1] for plain cosines, so one
// kappa serves every row while
//   kappa - s lowest <= kLow   and   s highest - kappa + ln C <= kHigh    (s > 0; else the ends change places)
// for every |s| up to the largest one here, with kappa = middle s + offset. Both ends count: no row may lose all
// of its terms. Whoever has a scale compares it with these numbers: were the logarithm taken on host and device,
// each with its own last digit, they could disagree at the border.
//
// E meets f in A and the slope of f in the coefficients, and their sums over the classes are to be numbers too:
// beyond [-1, 1] there is room for 4 max |f|, the most that the slope of a quadratic f is on [-1, 1] (Markov).
struct FixedShift {
  double largest_scale;
  double middle;  // of the range
  double offset;

  NF_HD bool serves(double scale) const { return std::fabs(scale) <= largest_scale; }
  NF_HD double kappa(double scale) const { return middle * scale + offset; }
};

template <class T>
NF_HD FixedShift fixed_shift_of(double classes, double lowest = -1.0, double highest = 1.0) {
  const double log_classes = std::log(classes), low = ExpRange<T>::kLow;
  const double reach = std::fmax(std::fabs(lowest), std::fabs(highest));
  const double high = ExpRange<T>::kHigh - (reach > 1.0 ? std::log(4.0 * reach) : 0.0);
  return {(low + high - log_classes) / (highest - lowest), 0.5 * (lowest + highest),
          0.5 * (low - high + log_classes)};
}

// E_j = 2^(slope c_j + offset): one multiply-add and the power of two that hardware has.
struct PowerOfTwo {
  float slope;
  float offset;
};

constexpr double kLog2E = 1.4426950408889634074;

NF_HD PowerOfTwo power_of_two(double scale, double kappa) {
  return {float(scale * kLog2E), float(-kappa * kLog2E)};
}

struct RowSoftmax {
  double softplus;  // -log p_y
  double q;         // 1 - p_y
  double weight;    // p_j = E_j * weight; q / S, and 0 where there is no other class
};

NF_HD RowSoftmax softmax_row(double sum, double kappa, double target_logit) {
  const double t = std::log(sum) + kappa - target_logit;
  const double e = std::exp(t > 0 ? -t : t);
  const double softplus = (t > 0 ? t : 0.0) + std::log1p(e);
  const double q = t > 0 ? 1.0 / (1.0 + e) : e / (1.0 + e);
  return {softplus, q, sum > 0 ? q / sum : sum};
}

// Class weights u and label smoothing a (torch's cross_entropy): with lse = softplus + z,
//   loss = (1 - a) u_y (lse - z) + a/C sum_j u_j (lse - z_j) = total * softplus + s * smooth
//   total  = (1 - a) u_y + a/C sum u
//   smooth = a/C [psi sum u - <x_hat, U> - u_y (psi - c_y)],  U = sum_j u_j w_hat_j
// d loss / d z_j is total p_j - a/C u_j for the others, d loss / d (s psi) is -total q + pull, with
//   pull = a/C (sum u - u_y),  push = a/C u_y.
// Without either: total = 1 and the rest is 0.
struct SmoothingTerms {
  double total;
  double smooth;
  double pull;
  double push;
  double each;  // a/C
};

NF_HD SmoothingTerms smoothing_terms(double smoothing, double classes, double target_weight,
                                     double weight_sum, double psi, double cosine, double cosine_with_sum) {
  const double each = smoothing / classes;
  return {(1.0 - smoothing) * target_weight + each * weight_sum,
          each * (psi * weight_sum - cosine_with_sum - target_weight * (psi - cosine)),
          each * (weight_sum - target_weight), each * target_weight, each};
}

// The sums of a row over the other classes.
struct RowSums {
  double sum;         // S
  double sum_cosine;  // A
  double kappa;
};

// The loss of one row and its slopes: d loss / d c_j, j != y, is others * E_j + uniform * u_j.
struct RowTerms {
  double loss;
  double others;
  double target;   // d loss / d c_y: through psi, and what the target's part of U takes back
  double uniform;  // -s a/C
  double scale;    // d loss / d s
  double psi;      // d loss / d psi
};

NF_HD RowTerms row_terms(const RowSums& sums, double scale, const ValueAndSlope<double>& psi,
                         const SmoothingTerms& weights) {
  const RowSoftmax row = softmax_row(sums.sum, sums.kappa, scale * psi.value);
  const double of_psi = scale * (weights.pull - weights.total * row.q);
  return {weights.total * row.softplus + scale * weights.smooth,
          scale * weights.total * row.weight,
          of_psi * psi.slope + scale * weights.push,
          -scale * weights.each,
          weights.total * (row.weight * sums.sum_cosine - row.q * psi.value) + weights.smooth,
          of_psi};
}

}  // namespace nf::math
