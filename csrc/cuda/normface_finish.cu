// The second stage of the fused head on CUDA: margin, weights, losses, from sums over all classes.
#include "head.cuh"
#include "math/margin.h"
#include "row_scale.cuh"

namespace nf {
namespace {

// kSmooth = <x_hat, U> for finish_loss_kernel. One warp per row.
template <class T>
NF_KERNEL(kThreads)
dot_class_sum_kernel(StoredArray x,                    // [N, D]
                     const T* __restrict__ class_sum,  // [D + 1]
                     int64_t dim, double eps, RowState swept, RowState rows) {
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  const auto scale = feature_scale_again<T>(x, i, dim, eps, swept.at(kInverseNorm, i));
  double dot = 0;
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    dot += x.load<double>(i * dim + d) * scale.outer * double(class_sum[d]);
  dot = warp_sum(dot);
  if (lane_id() == 0) rows.at(kSmooth, i) = dot * scale.inner;
}

struct Margin {
  double m1, m2, m3;
};

// Margin, final weights and losses of the rows, and the losses' reduction: `swept` holds sums over all
// classes, `rows` receives them and the rest. One block: N is small, and the order is fixed.
template <class T>
NF_KERNEL(kThreads)
finish_loss_kernel(RowState swept, RowState rows, Scale scale, Margin margin, int64_t reduction,
                   double smoothing, int64_t total_classes,
                   const T* __restrict__ class_weight_sum,  // [] or null: no smoothing
                   T* __restrict__ loss)                    // [N] or []
{
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  const double s = scale.value();
  const double weight_sum = class_weight_sum != nullptr ? double(*class_weight_sum) : 0.0;
  double kept = 0, total = 0;
  for (int64_t i = thread_id(); i < rows.batch; i += kThreads)
    kept += swept.at(kRowWeight, i) * swept.at(kTargetWeight, i);
  kept = block_sum(kept, scratch);
  const double each = reduction != kMean ? 1.0 : kept != 0.0 ? 1.0 / kept : 0.0;
  for (int64_t i = thread_id(); i < rows.batch; i += kThreads) {
    for (int field = 0; field < kPsi; ++field) rows.at(RowField(field), i) = swept.at(RowField(field), i);
    const double weight = swept.at(kRowWeight, i) * each;
    const double with_sum = class_weight_sum != nullptr ? rows.at(kSmooth, i) : 0.0;
    math::ValueAndSlope<double> psi{0.0, 0.0};
    math::SmoothingTerms weights{0.0, 0.0, 0.0, 0.0};
    if (weight != 0.0) {  // else psi and the weights are 0
      psi = math::Margin{margin.m1, margin.m2, margin.m3}(swept.at(kCosine, i));
      weights = math::smoothing_terms(smoothing, double(total_classes), swept.at(kTargetWeight, i),
                                      weight_sum, psi.value, swept.at(kCosine, i), with_sum);
    }
    rows.at(kRowWeight, i) = weight;
    if (weight == 0.0) rows.at(kShift, i) = 0;  // backward takes the row as zero, so its scores are 0
    rows.at(kPsi, i) = psi.value;
    rows.at(kPsiSlope, i) = psi.slope;
    rows.at(kTotal, i) = weights.total;
    rows.at(kSmooth, i) = weights.smooth;
    rows.at(kPull, i) = weights.pull;
    rows.at(kPush, i) = weights.push;
    const double weighted = weight != 0.0 ? weight * math::row_loss(softmax_of(rows, s, i), weights, s) : 0.0;
    if (reduction == kNone) loss[i] = T(weighted);
    total += weighted;
  }
  total = block_sum(total, scratch);
  if (reduction != kNone && thread_id() == 0) *loss = T(total);
}

std::tuple<Tensor, Tensor> normface_finish(Tensor rows, Tensor x, Tensor class_sum,
                                           std::optional<Tensor> scale, double scale_value, double m1,
                                           double m2, double m3, int64_t reduction, double smoothing,
                                           int64_t total_classes, double eps) {
  check_finish("normface_finish", rows, x, class_sum, smoothing);
  check_number("normface_finish", "scale", scale, x);
  Queue queue(x);
  const int64_t N = x.size(0), D = x.size(1);
  const ScalarType wide = accumulator(x.scalar_type());
  const Tensor finished = device_empty(x, {kRowFields, N}, ScalarType::Double);
  const Tensor loss = reduction == kNone ? device_empty(x, {N}, wide) : device_empty(x, {}, wide);
  const RowState swept(rows), state(finished);
  dispatch_accumulator(x.scalar_type(), [&]<class T>() {
    const T* sums = data_or_null<const T>(class_sum);
    if (sums != nullptr)
      launch("dot_class_sum", queue, dot_class_sum_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(x),
             sums, D, eps, swept, state);
    launch("finish_loss", queue, finish_loss_kernel<T>, Grid{1}, kThreads,
           shared_bytes<double>(kThreads / kWarp), swept, state, Scale(scale, scale_value),
           Margin{m1, m2, m3}, reduction, smoothing, total_classes, sums != nullptr ? sums + D : nullptr,
           data_or_null<T>(loss));
  });
  return {loss, finished};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) { m.impl("normface_finish", TORCH_BOX(&nf::normface_finish)); }
