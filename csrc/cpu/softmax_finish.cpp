// Second stage of the fused head on the CPU: from sums over all classes to losses and their slopes.
#include "cpu/head_stages.h"
#include "cpu/row_terms.h"
#include "math/margins/margin.h"

namespace nf::cpu {
namespace {

// A sum that adds up what its roundings lose, too (Neumaier): those of many like terms all go one way.
class CompensatedSum {
 public:
  void add(double term) {
    const double next = sum_ + term;
    lost_ += std::fabs(sum_) >= std::fabs(term) ? (sum_ - next) + term : (term - next) + sum_;
    sum_ = next;
  }
  double value() const { return std::isfinite(sum_) ? sum_ + lost_ : sum_; }

 private:
  double sum_ = 0, lost_ = 0;
};

// <x_hat, U> of row i.
template <class T>
double dot_class_sum(const FinishInputs& in, const RowState& rows, int64_t i, const T* class_sum) {
  const int64_t D = in.x.size(1);
  const Rows<T> x(in.x, D);
  std::vector<T> row(static_cast<size_t>(D));
  const double inverse = rows[kInverseNorm][i];
  const bool serves = math::inverse_serves(inverse);
  if (serves)
    x.kernel.widen(x.row(i), D, T(1), row.data());
  else
    x.kernel.normalize_wide(x.row(i), D, 2, T(in.eps), row.data());
  return dot_in_double(row.data(), class_sum, D) * (serves ? inverse : 1.0);
}

template <class T>
void finish(const FinishInputs& in, const FinishedRows& of) {
  const RowState rows(of.rows, in.x.size(0));
  const RowSlopes slopes(of.slopes, in.x.size(0));
  T* loss = data_of<T>(of.loss);
  const RowNumbers scale(in.scale, in.scale_value), m1(in.m1, in.m1_value), m2(in.m2, in.m2_value),
      m3(in.m3, in.m3_value);
  const T* class_sum = data_of<T>(of.class_sum);
  const int64_t N = rows.batch;
  double kept = 0;
  for (int64_t i = 0; i < N; ++i) kept += rows[kRowWeight][i] * rows[kTargetWeight][i];
  const double each = in.reduction != kMean ? 1.0 : kept != 0.0 ? 1.0 / kept : 0.0;
  std::vector<double> losses(static_cast<size_t>(N));
  for_rows(N, class_sum != nullptr ? in.x.size(1) : 16, [&](int64_t i) {
    const double weight = rows[kRowWeight][i] * each;
    math::RowTerms terms{};
    math::MarginSlopes of_margin{};
    if (weight != 0.0) {
      const double c = rows[kCosine][i];
      const math::Margin margin{int(in.formula), m1[i], m2[i], m3[i], int(in.guard)};
      math::ValueAndSlope<double> psi = margin(c);
      if (in.straight) psi.slope = 1.0;
      const math::SmoothingTerms weights =
          math::smoothing_terms(in.smoothing, double(in.total_classes), rows[kTargetWeight][i],
                                class_sum != nullptr ? double(class_sum[in.x.size(1)]) : 0.0, psi.value, c,
                                class_sum != nullptr ? dot_class_sum(in, rows, i, class_sum) : 0.0);
      terms = math::row_terms({rows[kSum][i], rows[kSecondSum][i], rows[kShift][i]}, scale[i], psi, weights);
      if (in.need_margin) of_margin = margin.slopes(c);
    }
    losses[size_t(i)] = weight != 0.0 ? weight * terms.loss : 0.0;
    slopes[kOthersSlope][i] = weight * terms.others;
    slopes[kTargetSlope][i] = weight * terms.target;
    slopes[kUniformSlope][i] = weight * terms.uniform;
    slopes[kScaleSlope][i] = weight * terms.scale;
    if (!in.need_margin) return;
    slopes[kM1Slope][i] = weight * terms.psi * of_margin.m1;
    slopes[kM2Slope][i] = weight * terms.psi * of_margin.m2;
    slopes[kM3Slope][i] = weight * terms.psi * of_margin.m3;
  });
  CompensatedSum total;
  for (int64_t i = 0; i < N; ++i) {
    if (in.reduction == kNone) loss[i] = T(losses[size_t(i)]);
    total.add(losses[size_t(i)]);
  }
  if (in.reduction != kNone) *loss = T(total.value());
}

}  // namespace

void finish_into(const FinishInputs& in, const FinishedRows& of) {
  dispatch_accumulator(in.x.scalar_type(), [&]<class T>() { finish<T>(in, of); });
}

namespace {

std::tuple<Tensor, Tensor> softmax_finish(const SoftmaxFinishArguments& in) {
  check_finish(in);
  const int64_t N = in.x.size(0);
  const ScalarType wide = accumulator(in.x.scalar_type());
  const Tensor slopes = fresh({in.need_margin ? kAllSlopes : kSlopeFields, N}, ScalarType::Double);
  const Tensor loss = in.reduction == kNone ? fresh({N}, wide) : fresh({}, wide);
  finish_into(in, {in.rows, in.class_sum, loss, slopes});
  return {loss, slopes};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) { nf::implement<&nf::cpu::softmax_finish>(m); }
