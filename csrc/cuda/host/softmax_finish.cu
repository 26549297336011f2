// The second stage of the fused head on CUDA: margin, weights, losses and slopes, from sums over all classes.
#include "cuda/device/per_row.cuh"
#include "cuda/device/row_scale.cuh"
#include "cuda/device/row_state.cuh"
#include "cuda/host/head_stages.h"
#include "cuda/products/cublas.h"
#include "engine/head_arguments.h"
#include "math/margins/margin.h"
#include "math/softmax.h"

namespace nf {
namespace {

// with_sum[i] = <x_hat, U> for finish_loss_kernel. One warp per row.
template <class T>
NF_KERNEL(kThreads)
dot_class_sum_kernel(StoredArray x,                    // [N, D]
                     const T* __restrict__ class_sum,  // [D + 1]
                     int64_t dim, double eps, RowState rows,
                     double* __restrict__ with_sum)  // [N]
{
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  const auto scale = feature_scale_again<T>(x, i, dim, eps, rows.at(kInverseNorm, i));
  double dot = 0;
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    dot += x.load<double>(i * dim + d) * scale.outer * double(class_sum[d]);
  dot = warp_sum(dot);
  if (lane_id() == 0) with_sum[i] = dot * scale.inner;
}

struct Margins {
  int formula;
  RowNumbers m1, m2, m3;
  int guard;
  bool straight;

  NF_DEVICE math::Margin at(int64_t i) const { return {formula, m1.at(i), m2.at(i), m3.at(i), guard}; }
};

template <class T>
struct FinishRows {
  RowState rows;
  RowNumbers scale;
  Margins margin;
  int64_t reduction;
  double smoothing;
  double total_classes;
  const T* weight_sum;     // [] or null: no smoothing
  const double* with_sum;  // [N], with weight_sum
  RowSlopes slopes;
  bool need_margin;
  T* loss;  // [N] or []
};

// The losses of the rows, which hold sums over all classes, their slopes, and the losses' reduction. One
// block: N is small, and the order is fixed.
template <class T>
NF_KERNEL(kThreads)
finish_loss_kernel(FinishRows<T> task) {
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  const RowState& rows = task.rows;
  const bool smooth = task.weight_sum != nullptr;
  double kept = 0, total = 0;
  for (int64_t i = thread_id(); i < rows.batch; i += kThreads)
    kept += rows.at(kRowWeight, i) * rows.at(kTargetWeight, i);
  kept = block_sum(kept, scratch);
  const double each = task.reduction != kMean ? 1.0 : kept != 0.0 ? 1.0 / kept : 0.0;
  for (int64_t i = thread_id(); i < rows.batch; i += kThreads) {
    const double weight = rows.at(kRowWeight, i) * each;
    math::RowTerms terms{};
    if (weight != 0.0) {
      const double c = rows.at(kCosine, i);
      math::ValueAndSlope<double> psi = task.margin.at(i)(c);
      if (task.margin.straight) psi.slope = 1.0;
      const math::SmoothingTerms weights = math::smoothing_terms(
          task.smoothing, task.total_classes, rows.at(kTargetWeight, i),
          smooth ? double(*task.weight_sum) : 0.0, psi.value, c, smooth ? task.with_sum[i] : 0.0);
      terms = math::row_terms({rows.at(kSum, i), rows.at(kSecondSum, i), rows.at(kShift, i)},
                              task.scale.at(i), psi, weights);
    }
    const double weighted = weight != 0.0 ? weight * terms.loss : 0.0;
    task.slopes.at(kOthersSlope, i) = weight * terms.others;
    task.slopes.at(kTargetSlope, i) = weight * terms.target;
    task.slopes.at(kUniformSlope, i) = weight * terms.uniform;
    task.slopes.at(kScaleSlope, i) = weight * terms.scale;
    if (task.reduction == kNone) task.loss[i] = T(weighted);
    total += weighted;
    if (task.need_margin) {
      // Last: few registers are left while the margin's sines are computed.
      const double of_psi = weight * terms.psi;
      math::MarginSlopes of_margin{};
      if (weight != 0.0) of_margin = task.margin.at(i).slopes(rows.at(kCosine, i));
      task.slopes.at(kM1Slope, i) = of_psi * of_margin.m1;
      task.slopes.at(kM2Slope, i) = of_psi * of_margin.m2;
      task.slopes.at(kM3Slope, i) = of_psi * of_margin.m3;
    }
  }
  total = block_sum(total, scratch);
  if (task.reduction != kNone && thread_id() == 0) *task.loss = T(total);
}

}  // namespace

void finish_into(Queue& queue, const FinishInputs& in, const FinishedRows& of) {
  const int64_t N = in.x.size(0), D = in.x.size(1);
  const Tensor with_sum = device_empty(in.x, {of.class_sum.count() > 0 ? N : 0}, ScalarType::Double);
  const RowState rows(of.rows, N);
  dispatch_accumulator(in.x.scalar_type(), [&]<class T>() {
    const T* sums = data_of<const T>(of.class_sum);
    if (sums != nullptr)
      launch("dot_class_sum", queue, dot_class_sum_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(in.x),
             sums, D, in.eps, rows, data_of<double>(with_sum));
    launch("finish_loss", queue, finish_loss_kernel<T>, Grid{1}, kThreads,
           shared_bytes<double>(kThreads / kWarp),
           FinishRows<T>{rows,
                         {in.scale, in.scale_value},
                         {int(in.formula),
                          {in.m1, in.m1_value},
                          {in.m2, in.m2_value},
                          {in.m3, in.m3_value},
                          int(in.guard),
                          in.straight},
                         in.reduction,
                         in.smoothing,
                         double(in.total_classes),
                         sums != nullptr ? sums + D : nullptr,
                         data_of<double>(with_sum),
                         RowSlopes(of.slopes, N),
                         in.need_margin,
                         data_of<T>(of.loss)});
  });
}

namespace {

std::tuple<Tensor, Tensor> softmax_finish(const SoftmaxFinishArguments& in) {
  check_finish(in);
  Queue queue(in.x);
  const int64_t N = in.x.size(0);
  const ScalarType wide = accumulator(in.x.scalar_type());
  const Tensor slopes =
      device_empty(in.x, {in.need_margin ? kAllSlopes : kSlopeFields, N}, ScalarType::Double);
  const Tensor loss = in.reduction == kNone ? device_empty(in.x, {N}, wide) : device_empty(in.x, {}, wide);
  finish_into(queue, in, {in.rows, in.class_sum, loss, slopes});
  return {loss, slopes};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) { nf::implement<&nf::softmax_finish>(m); }
