// The kernels of the head's backward other than its products: per row, and per class.
#pragma once

#include <cstring>

#include "cuda/device/class_gradient.cuh"
#include "cuda/device/project_row.cuh"
#include "cuda/host/head.cuh"
#include "cuda/products/sm80_single_sweep.h"

namespace nf {
namespace {

// What row i contributes to the gradients, upstream gradient included: the factors of x_sum (and of E x_hat in
// dW), of the target, and of class_sum (and of class_weight_j x_hat in dW); and to the gradient of the scale.
// How the row was scaled, x_hat = x * outer * inner, and what it says to its term. All 0 where the row has no
// slope.
enum GradientField {
  kOthers,
  kTarget,
  kUniform,
  kScale,
  kOuter,
  kInner,
  kKappa,
  kThreshold,
  kGradientFields
};

// Gradients of the features, from the table of what the rows contribute.
template <class T>
struct FeatureGradients {
  StoredArray x, w;       // [N, D], [C, D]
  const T* inverse_norm;  // [C]
  const int64_t* labels;  // [N]
  int64_t batch, dim, classes;
  bool is_shard;
  const double* gradients;  // [kGradientFields, N]
  const T* x_sum;           // [N, D]
  const T* class_sum;       // [D] or null
  double eps;
  StoredArray dx;  // [N, D], or null: not wanted here

  NF_DEVICE double of(GradientField field, int64_t i) const { return gradients[field * batch + i]; }
};

// dx = P_x(others * x_sum + target * w_hat_y + uniform * class_sum) of a row with a slope; zeros for others. One
// warp.
template <class T>
NF_DEVICE void write_grad_features(const FeatureGradients<T>& task, int64_t i, bool ignored,
                                   const math::RowScale<double>& scale, double others, double target,
                                   double uniform) {
  const int64_t dim = task.dim;
  if (ignored) return clear_row<double>(i, dim, task.dx);
  const int64_t label = task.labels[i];
  math::RowScale<T> of_class{};
  if (label != kElsewhere) of_class = scale_again(task.w, label, dim, T(task.eps), task.inverse_norm[label]);
  const auto gradient = [&](int64_t d) {
    return others * double(task.x_sum[i * dim + d]) +
           (label != kElsewhere ? target * (task.w.template load<double>(label * dim + d) *
                                            double(of_class.outer) * double(of_class.inner))
                                : 0.0) +
           (task.class_sum != nullptr ? uniform * double(task.class_sum[d]) : 0.0);
  };
  project_row<double>(task.x, i, dim, task.eps, scale, gradient, task.dx);
}

// Where x_sum is known only after the second sweep. One warp per row.
template <class T>
NF_KERNEL(kThreads)
feature_gradients_kernel(FeatureGradients<T> task) {
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= task.batch) return;  // the whole warp leaves
  const double outer = task.of(kOuter, i), inner = task.of(kInner, i);
  const bool ignored = outer == 0.0;
  const math::RowScale<double> scale{outer, inner, 1.0 / (outer * inner)};
  write_grad_features(task, i, ignored, scale, task.of(kOthers, i), task.of(kTarget, i),
                      task.of(kUniform, i));
}

template <class T>
struct RowGradients {
  RowState rows;
  RowSlopes slopes;
  RowNumbers scale;
  const double* threshold;  // [N] or null
  const T* grad_loss;       // [N] or []
  bool per_row;
  double* gradients;   // [kGradientFields, N]
  double* grad_scale;  // [N], perhaps kScale of gradients
  FeatureGradients<T> features;
  StoredArray x_hat;     // [N, D], operand type, or null: unit features once more, for scores
  StoredArray weighted;  // [N, D], type of what meets E, or null: times the factor of the row
  SweepRow* sweep_rows;  // [N] or null
  float* powers;  // [N, up to a multiple of 4]: the powers of two that weighted is without, with kPowers
};

// The exponent of x as a power of two may have it that is a normal float, and whose inverse is.
NF_DEVICE int exponent_of(double x) {
  uint64_t word;
  memcpy(&word, &x, sizeof(word));
  const int exponent = int(word >> 52 & 2047) - 1023;  // far out where x is 0 or no number
  return exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
}
NF_DEVICE double power_of_two(int exponent) {
  const uint64_t word = uint64_t(exponent + 1023) << 52;
  double power;
  memcpy(&power, &word, sizeof(power));
  return power;
}

// Everything that is made of one row. A row without a slope is taken as zero: nothing it holds, NaN included,
// reaches a class. kPowers: `powers` are wanted. One warp per row.
template <class T, bool kPowers>
NF_KERNEL(kThreads)
row_gradients_kernel(RowGradients<T> task) {
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  const RowState& rows = task.rows;
  const FeatureGradients<T>& features = task.features;
  if (i >= rows.batch) return;  // the whole warp leaves
  double others = task.slopes.at(kOthersSlope, i), target = task.slopes.at(kTargetSlope, i),
         uniform = task.slopes.at(kUniformSlope, i), scale = task.slopes.at(kScaleSlope, i), kappa = 0,
         threshold = 0;
  const bool ignored = others == 0.0 && target == 0.0 && uniform == 0.0 && scale == 0.0;
  math::RowScale<double> of_row{};
  if (!ignored) {
    const int64_t label = features.labels[i];
    NF_DEVICE_CHECK(
        (label >= 0 && label < features.classes) || (features.is_shard && label == kElsewhere),
        "head_backward: expected `labels` in [0, %lld) where a row has slopes, got %lld at row %lld",
        (long long)features.classes, (long long)label, (long long)i);
    of_row = feature_scale_again<T>(features.x, i, features.dim, features.eps, rows.at(kInverseNorm, i));
    const double g = double(task.grad_loss[task.per_row ? i : 0]);
    others *= g, target *= g, uniform *= g, scale *= g;
    kappa = rows.at(kShift, i);
    if (task.threshold != nullptr) threshold = task.threshold[i];
  }
  if (lane_id() == 0) {
    task.gradients[kOthers * rows.batch + i] = others;
    task.gradients[kTarget * rows.batch + i] = target;
    task.gradients[kUniform * rows.batch + i] = uniform;
    task.grad_scale[i] = scale;
    task.gradients[kOuter * rows.batch + i] = of_row.outer;
    task.gradients[kInner * rows.batch + i] = of_row.inner;
    task.gradients[kKappa * rows.batch + i] = kappa;
    task.gradients[kThreshold * rows.batch + i] = threshold;
    if (task.sweep_rows != nullptr) {
      // An ignored row's label may be any int64; only a class fits into 32 bits.
      const auto power = math::power_of_two(task.scale.at(i), kappa);
      task.sweep_rows[i] = {power.slope, power.offset, int(ignored ? kElsewhere : features.labels[i])};
    }
  }
  if (features.dx.data != nullptr) write_grad_features(features, i, ignored, of_row, others, target, uniform);
  if (task.weighted.data == nullptr && task.x_hat.data == nullptr) return;
  if constexpr (kPowers) {
    const int exponent = exponent_of(others);
    others *= power_of_two(-exponent);
    if (lane_id() == 0) {
      task.powers[i] = float(power_of_two(exponent));
      if (i + 1 == rows.batch)
        for (int64_t j = rows.batch; j % 4 != 0; ++j) task.powers[j] = 0.0f;
    }
  }
  for (int64_t d = lane_id(); d < features.dim; d += kWarp) {
    const double x = ignored ? 0.0 : features.x.template load<double>(i * features.dim + d);
    const double unit = x * of_row.outer * of_row.inner;
    if (task.x_hat.data != nullptr) task.x_hat.template store<T>(i * features.dim + d, T(unit));
    if (task.weighted.data != nullptr)
      task.weighted.template store<T>(i * features.dim + d, T(others * unit));
  }
}

// d loss / d scale. One block, fixed order.
NF_KERNEL(kThreads)
scale_gradient_kernel(const double* __restrict__ gradients,  // [kGradientFields, N]
                      int64_t batch, double* __restrict__ grad_scale) {
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  double total = 0;
#pragma unroll 8
  for (int64_t i = thread_id(); i < batch; i += kThreads) total += gradients[kScale * batch + i];
  total = block_sum(total, scratch);
  if (thread_id() == 0) *grad_scale = total;
}

constexpr int64_t kUniformRun = 64;  // rows of a run

// partial[b][d] = sum over the b-th run of rows of kUniform x_hat_d: what every class gets, times its weight. Blocks:
// runs x columns.
NF_KERNEL(kThreads)
uniform_gradient_kernel(StoredArray x, int64_t batch, int64_t dim, const double* __restrict__ gradients,
                        double* __restrict__ partial)  // [runs, D]
{
  const int64_t d = block_y() * kThreads + thread_id();
  if (d >= dim) return;
  const int64_t first = block_id() * kUniformRun,
                end = first + kUniformRun < batch ? first + kUniformRun : batch;
  const auto of = [&](GradientField field, int64_t i) { return gradients[field * batch + i]; };
  double total = 0;
  x.visit<double>([&](const auto* rows) {
#pragma unroll 4
    for (int64_t i = first; i < end; ++i) {
      const double uniform = of(kUniform, i);
      if (uniform != 0.0) total += uniform * (double(rows[i * dim + d]) * of(kOuter, i) * of(kInner, i));
    }
  });
  partial[block_id() * dim + d] = total;
}

}  // namespace
}  // namespace nf
