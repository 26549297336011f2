// Second stage of the fused head on the CPU: from sums over all classes to losses.
#include "cpu/normface.h"
#include "math/margin.h"

namespace nf::cpu {
namespace {

struct FinishArguments {
  Tensor rows, x, class_sum;
  double scale;
  math::Margin margin;
  int64_t reduction;
  double smoothing;
  int64_t total_classes;
  double eps;
};

// Margin and weights of every row; the rows' weights in the result.
template <class T>
void weigh_rows(const FinishArguments& in, const RowState& rows) {
  const int64_t D = in.x.size(1);
  const Rows<T> x(in.x, D);
  const T* class_sum = data_of<T>(in.class_sum);
  double kept = 0;
  for (int64_t i = 0; i < rows.batch; ++i) kept += rows[kRowWeight][i] * rows[kTargetWeight][i];
  const double each = in.reduction != kMean ? 1.0 : kept != 0.0 ? 1.0 / kept : 0.0;
  for_rows(rows.batch, class_sum != nullptr ? D : 16, [&](int64_t i) {
    rows[kRowWeight][i] *= each;
    if (rows[kRowWeight][i] == 0.0) {  // psi and the weights stay 0
      rows[kShift][i] = 0;             // backward takes the row as zero, so its scores are 0
      return;
    }
    const auto psi = in.margin(rows[kCosine][i]);
    rows[kPsi][i] = psi.value;
    rows[kPsiSlope][i] = psi.slope;
    double with_sum = 0;
    if (class_sum != nullptr) {
      std::vector<T> row(static_cast<size_t>(D));
      const double inverse = rows[kInverseNorm][i];
      const bool serves = math::inverse_serves(inverse);
      if (serves)
        x.kernel.widen(x.row(i), D, T(1), row.data());
      else
        x.kernel.normalize_wide(x.row(i), D, 2, T(in.eps), row.data());
      with_sum = dot_in_double(row.data(), class_sum, D) * (serves ? inverse : 1.0);
    }
    const math::SmoothingTerms weights = math::smoothing_terms(
        in.smoothing, double(in.total_classes), rows[kTargetWeight][i],
        class_sum != nullptr ? double(class_sum[D]) : 0.0, psi.value, rows[kCosine][i], with_sum);
    rows[kTotal][i] = weights.total;
    rows[kSmooth][i] = weights.smooth;
    rows[kPull][i] = weights.pull;
    rows[kPush][i] = weights.push;
  });
}

template <class T>
void reduce_loss(const RowState& rows, double scale, int64_t reduction, T* loss) {
  double total = 0;
  for (int64_t i = 0; i < rows.batch; ++i) {
    const double weight = rows[kRowWeight][i];
    const double weighted =
        weight == 0.0 ? 0.0
                      : weight * math::row_loss(softmax_of(rows, scale, i), smoothing_of(rows, i), scale);
    if (reduction == kNone) loss[i] = T(weighted);
    total += weighted;
  }
  if (reduction != kNone) *loss = T(total);
}

std::tuple<Tensor, Tensor> normface_finish(Tensor rows, Tensor x, Tensor class_sum,
                                           std::optional<Tensor> scale, double scale_value, double m1,
                                           double m2, double m3, int64_t reduction, double smoothing,
                                           int64_t total_classes, double eps) {
  check_finish("normface_finish", rows, x, class_sum, smoothing);
  check_number("normface_finish", "scale", scale, x);
  const int64_t N = x.size(0);
  const ScalarType wide = accumulator(x.scalar_type());
  Tensor finished = fresh({kRowFields, N}, ScalarType::Double);
  const RowState state = row_state(finished);
  std::copy_n(static_cast<const double*>(rows.const_data_ptr()), kRowFields * N, state.data);
  Tensor loss = reduction == kNone ? fresh({N}, wide) : fresh({}, wide);
  const FinishArguments in{rows,         x,         class_sum, number_argument(scale, scale_value),
                           {m1, m2, m3}, reduction, smoothing, total_classes,
                           eps};
  const auto run = [&]<class T>(T) {
    weigh_rows<T>(in, state);
    reduce_loss(state, in.scale, reduction, static_cast<T*>(loss.mutable_data_ptr()));
  };
  wide == ScalarType::Double ? run(double()) : run(float());
  return {loss, finished};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) { m.impl("normface_finish", TORCH_BOX(&nf::cpu::normface_finish)); }
