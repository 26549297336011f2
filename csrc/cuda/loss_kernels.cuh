// The kernels of the fused head other than its products: per row, and per element of a chunk of scores.
// Used by normface_loss.cu, which says what they work towards.
#pragma once

#include <optional>

#include "math/margin.h"
#include "math/normalize.h"
#include "math/softmax.h"
#include "reduce.cuh"
#include "row_access.cuh"
#include "row_state.cuh"
#include "stored.cuh"

namespace nf {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;
constexpr int64_t kColumnsPerBlock = 4096;  // of a row of scores, per block of `exponentiate`

Grid warp_per_row(int64_t rows) { return {(rows + kRowsPerBlock - 1) / kRowsPerBlock}; }

// Constant factors of the rows or of the classes, all 1 unless given.
template <class T>
struct Factors {
  bool given;
  const T* data;  // [N] or [C]; null in an empty shard too

  explicit Factors(const std::optional<Tensor>& t)
      : given(t.has_value()), data(given ? static_cast<const T*>(t->const_data_ptr()) : nullptr) {}
  NF_DEVICE double operator[](int64_t i) const { return given ? double(data[i]) : 1.0; }
};

// Everything a row knows before the sweep: its norm, its weight, the shift, and, where its target is among
// the classes at hand, the target's cosine (products and sums in double, from the raw rows). An ignored
// row becomes zero, so that nothing it holds, NaN included, reaches another row or a class. One warp per
// row.
template <class T>
NF_KERNEL(kThreads)
prepare_rows_kernel(StoredArray x, StoredArray w,        // [N, D], [C, D]
                    const int64_t* __restrict__ labels,  // [N]
                    int64_t dim, int64_t classes, int64_t classes_in_all, bool partial, int64_t ignore_index,
                    double eps, Scale scale, const double* __restrict__ given_shift,  // [N] or null
                    Factors<T> sample_weight, Factors<T> class_weight, RowState rows,
                    StoredArray x_hat)  // [N, D], operand type
{
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  const int64_t label = labels[i];
  const bool ignored = label == ignore_index;
  const bool elsewhere = partial && label == kElsewhere;
  const bool here = !ignored && !elsewhere;
  NF_DEVICE_CHECK(
      !here || (label >= 0 && label < classes),
      "normface_sweep: expected `labels` in [0, %lld) or ignore_index (%lld), got %lld at row %lld",
      (long long)classes, (long long)ignore_index, (long long)label, (long long)i);
  double xx = 0, ww = 0, xw = 0;
  if (!ignored)
    for (int64_t d = lane_id(); d < dim; d += kWarp) {
      const double a = x.load<double>(i * dim + d), b = here ? w.load<double>(label * dim + d) : 0.0;
      xx += a * a;
      ww += b * b;
      xw += a * b;
    }
  xx = warp_sum(xx), ww = warp_sum(ww), xw = warp_sum(xw);
  const double x_norm = math::norm_value(2, xx, eps), w_norm = math::norm_value(2, ww, eps);
  const double inverse = ignored ? 0.0 : 1.0 / x_norm;
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    x_hat.store<T>(i * dim + d, ignored ? T(0) : T(x.load<double>(i * dim + d) * inverse));
  if (lane_id() != 0) return;
  const bool fixed = math::has_fixed_shift<T>(scale.value(), double(classes_in_all));
  for (int field = 0; field < kRowFields; ++field) rows.at(RowField(field), i) = 0;
  rows.at(kShift, i) = given_shift != nullptr ? given_shift[i]
                       : fixed                ? math::fixed_shift<T>(double(classes_in_all))
                                              : -INFINITY;
  if (ignored) return;
  rows.at(kInverseNorm, i) = inverse;
  rows.at(kCosine, i) = here ? xw / x_norm / w_norm : 0.0;
  rows.at(kRowWeight, i) = sample_weight[i];
  rows.at(kTargetWeight, i) = !class_weight.given ? 1.0 : here ? class_weight[label] : 0.0;
}

// Where a row's logits can be read: `count` of them, at data[i * row_stride + k * step], to be multiplied
// by the scale unless that was done. `first` is the class of k = 0, or kNoClass if k is not a class.
template <class T>
struct RowLogits {
  const T* data;
  int64_t count;
  int64_t row_stride;
  int64_t step;
  bool scaled;
  int64_t first;

  static constexpr int64_t kNoClass = INT64_MIN / 2;  // no label lies within `count` of it
};

// Outside the window of math/softmax.h: kappa becomes the largest logit seen so far, and what was
// added up under the old one is rescaled. Inside it every block returns at once. One block per row.
template <class T>
NF_KERNEL(kThreads)
update_shift_kernel(RowLogits<T> logits,
                    const int64_t* __restrict__ labels,  // [N]
                    int64_t classes_in_all, Scale scale, RowState rows,
                    T* __restrict__ x_sum,  // [N, D] or null
                    int64_t dim) {
  const double s = scale.value();
  if (math::has_fixed_shift<T>(s, double(classes_in_all))) return;
  SharedMemory shared;
  T* scratch = shared.take<T>(kThreads / kWarp);
  const int64_t i = block_id();
  const int64_t target = labels[i] - logits.first;
  T best = -T(INFINITY);
  for (int64_t k = thread_id(); k < logits.count; k += kThreads) {
    const T value = logits.data[i * logits.row_stride + k * logits.step];
    const T z = logits.scaled ? value : T(s) * value;
    best = k != target && z > best ? z : best;
  }
  best = block_largest(best, scratch);
  const double old = rows.at(kShift, i);
  const double shift = double(best) > old ? double(best) : old;
  const double factor = shift > old ? std::exp(old - shift) : 1.0;
  sync_block();  // every thread's read of the old shift, before it changes
  if (thread_id() == 0) {
    rows.at(kShift, i) = shift;
    rows.at(kSum, i) *= factor;
    rows.at(kSumCosine, i) *= factor;
  }
  if (x_sum != nullptr && factor != 1.0)
    for (int64_t d = thread_id(); d < dim; d += kThreads) x_sum[i * dim + d] *= T(factor);
}

// scores -> E, stored as O (in place where O is T); partial sums of S and A per row and split. The
// target's E is 0: its term is added apart, in double and with its margin. Blocks: rows x splits.
template <class T, class O>
NF_KERNEL(kThreads)
exponentiate_kernel(const T* scores,  // [N, stride], `width` of them valid
                    O* e,             // [N, e_stride], perhaps the same memory
                    int64_t width, int64_t stride, int64_t e_stride, int64_t first,
                    const int64_t* __restrict__ labels,  // [N]
                    Scale scale, RowState rows,
                    double* __restrict__ partial)  // [2, splits, N] or null
{
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  const int64_t i = block_id(), split = block_y(), splits = block_count_y();
  const int64_t begin = split * kColumnsPerBlock;
  const int64_t end = begin + kColumnsPerBlock < width ? begin + kColumnsPerBlock : width;
  const int64_t target = labels[i] - first;
  const T s = T(scale.value()), shift = T(rows.at(kShift, i));
  T sum = 0, sum_cosine = 0;
  for (int64_t j = begin + thread_id(); j < end; j += kThreads) {
    const T cosine = scores[i * stride + j];
    const T value = j == target ? T(0) : std::exp(cosine * s - shift);
    e[i * e_stride + j] = O(value);
    sum += value;
    sum_cosine += value * cosine;
  }
  if (partial == nullptr) return;
  const double total = block_sum(double(sum), scratch), total_cosine = block_sum(double(sum_cosine), scratch);
  if (thread_id() == 0) {
    partial[split * rows.batch + i] = total;
    partial[(splits + split) * rows.batch + i] = total_cosine;
  }
}

// rows.S += the partial sums, in the order of the splits.
NF_KERNEL(kThreads)
add_partials_kernel(const double* __restrict__ partial,  // [2, splits, N]
                    int64_t splits, RowState rows) {
  const int64_t i = block_id() * kThreads + thread_id();
  if (i >= rows.batch) return;
  double sum = 0, sum_cosine = 0;
  for (int64_t k = 0; k < splits; ++k) {
    sum += partial[k * rows.batch + i];
    sum_cosine += partial[(splits + k) * rows.batch + i];
  }
  rows.at(kSum, i) += sum;
  rows.at(kSumCosine, i) += sum_cosine;
}

// sum[i] += part[i]
template <class T>
NF_KERNEL(kThreads)
accumulate_kernel(const T* __restrict__ part, int64_t count, T* __restrict__ sum) {
  const int64_t i = block_id() * kThreads + thread_id();
  if (i < count) sum[i] += part[i];
}

// partial[b][d] = sum of class_weight_j w_hat_jd over the b-th run of classes, and for d = D of
// class_weight_j. Blocks: runs x columns.
template <class T>
NF_KERNEL(kThreads)
class_sum_kernel(StoredArray w,                       // [C, D]
                 const T* __restrict__ inverse_norm,  // [C]
                 int64_t classes, int64_t dim, Factors<T> class_weight,
                 double* __restrict__ partial)  // [runs, D + 1]
{
  const int64_t d = block_y() * kThreads + thread_id();
  if (d > dim) return;
  const int64_t first = block_id() * classes / block_count(),
                last = (block_id() + 1) * classes / block_count();
  double sum = 0;
  for (int64_t j = first; j < last; ++j)
    sum += class_weight[j] * (d < dim ? w.load<double>(j * dim + d) * double(inverse_norm[j]) : 1.0);
  partial[block_id() * (dim + 1) + d] = sum;
}

// class_sum = the sum of the partial ones, in order.
template <class T>
NF_KERNEL(kThreads)
add_class_sums_kernel(const double* __restrict__ partial,  // [runs, count]
                      int64_t runs, int64_t count,
                      T* __restrict__ class_sum)  // [count]
{
  const int64_t d = block_id() * kThreads + thread_id();
  if (d >= count) return;
  double sum = 0;
  for (int64_t k = 0; k < runs; ++k) sum += partial[k * count + d];
  class_sum[d] = T(sum);
}

// kSmooth = <x_hat, U> for finish_loss_kernel. One warp per row.
template <class T>
NF_KERNEL(kThreads)
dot_class_sum_kernel(StoredArray x,                    // [N, D]
                     const T* __restrict__ class_sum,  // [D + 1]
                     int64_t dim, RowState swept, RowState rows) {
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  double dot = 0;
  for (int64_t d = lane_id(); d < dim; d += kWarp) dot += x.load<double>(i * dim + d) * double(class_sum[d]);
  dot = warp_sum(dot);
  if (lane_id() == 0) rows.at(kSmooth, i) = dot * swept.at(kInverseNorm, i);
}

NF_DEVICE math::RowSoftmax softmax_of(const RowState& rows, double scale, int64_t i) {
  return math::softmax_row(rows.at(kSum, i), rows.at(kShift, i), scale * rows.at(kPsi, i));
}

NF_DEVICE math::RowWeights weights_of(const RowState& rows, int64_t i) {
  return {rows.at(kTotal, i), rows.at(kSmooth, i), rows.at(kPull, i), rows.at(kPush, i)};
}

struct Margin {
  double m1, m2, m3;
};

// Margin, final weights and losses of the rows, and the losses' reduction: `swept` holds sums over all
// classes, `rows` receives them and the rest. One block: N is small, and the order is fixed.
template <class T>
NF_KERNEL(kThreads)
finish_loss_kernel(RowState swept, RowState rows, Scale scale, Margin margin, int64_t reduction,
                   double smoothing, int64_t classes_in_all,
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
    math::RowWeights weights{0.0, 0.0, 0.0, 0.0};
    if (swept.at(kRowWeight, i) != 0.0) {  // else psi and the weights are 0
      psi = math::Margin{margin.m1, margin.m2, margin.m3}(swept.at(kCosine, i));
      weights = math::row_weights(smoothing, double(classes_in_all), swept.at(kTargetWeight, i), weight_sum,
                                  psi.value, swept.at(kCosine, i), with_sum);
    }
    rows.at(kRowWeight, i) = weight;
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

// What row i contributes to the gradients, upstream gradient and scale included: the factors of x_sum (and
// of E x_hat in dW), of the target, and of class_sum (and of class_weight_j x_hat in dW).
enum GradientField { kOthers, kTarget, kUniform, kGradientFields };

// Factors of every row, and d loss / d scale. One block, fixed order.
template <class T>
NF_KERNEL(kThreads)
row_gradients_kernel(const T* __restrict__ grad_loss,  // [N] or []
                     bool per_row, double uniform, RowState rows, Scale scale,
                     double* __restrict__ gradients,   // [kGradientFields, N]
                     double* __restrict__ grad_scale)  // [] or null
{
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  const double s = scale.value();
  double total = 0;
  for (int64_t i = thread_id(); i < rows.batch; i += kThreads) {
    double g = 0, others = 0, target = 0;
    if (rows.at(kRowWeight, i) != 0.0) {
      g = double(grad_loss[per_row ? i : 0]) * rows.at(kRowWeight, i);
      const math::RowSoftmax row = softmax_of(rows, s, i);
      const math::RowWeights weights = weights_of(rows, i);
      others = g * s * math::others_slope(row, weights);
      target = g * s * math::target_slope(row, weights, rows.at(kPsiSlope, i));
      total += g * math::scale_slope(row, weights, rows.at(kSumCosine, i), rows.at(kPsi, i));
    }
    gradients[kOthers * rows.batch + i] = others;
    gradients[kTarget * rows.batch + i] = target;
    gradients[kUniform * rows.batch + i] = -g * s * uniform;
  }
  total = block_sum(total, scratch);
  if (grad_scale != nullptr && thread_id() == 0) *grad_scale = total;
}

// sum[d] = sum over rows of kUniform x_hat_d: what every class gets, times its weight.
template <class T>
NF_KERNEL(kThreads)
uniform_gradient_kernel(StoredArray x, int64_t dim, RowState rows, const double* __restrict__ gradients,
                        T* __restrict__ sum)  // [D]
{
  const int64_t d = block_id() * kThreads + thread_id();
  if (d >= dim) return;
  double total = 0;
  for (int64_t i = 0; i < rows.batch; ++i)
    if (rows.at(kRowWeight, i) != 0.0)
      total += gradients[kUniform * rows.batch + i] * rows.at(kInverseNorm, i) * x.load<double>(i * dim + d);
  sum[d] = T(total);
}

// g[j] += class_weight_(first + j) uniform
template <class T>
NF_KERNEL(kThreads)
add_uniform_kernel(const T* __restrict__ uniform, int64_t dim, int64_t first, int64_t count,
                   Factors<T> class_weight, T* __restrict__ g)  // [count / D, D]
{
  for (int64_t k = block_id() * kThreads + thread_id(); k < count; k += block_count() * kThreads)
    g[k] += T(class_weight[first + k / dim]) * uniform[k % dim];
}

// Unit features once more (for scores), and times the factor of the row (for dW). One warp per row.
template <class T>
NF_KERNEL(kThreads)
weighted_features_kernel(StoredArray x, int64_t dim, RowState rows,
                         const double* __restrict__ gradients,     // [kGradientFields, N]
                         StoredArray x_hat, StoredArray weighted)  // [N, D], operand types; x_hat or null
{
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  const bool ignored = rows.at(kRowWeight, i) == 0.0;
  const double inverse = rows.at(kInverseNorm, i), factor = gradients[kOthers * rows.batch + i];
  for (int64_t d = lane_id(); d < dim; d += kWarp) {
    const double unit = ignored ? 0.0 : x.load<double>(i * dim + d) * inverse;
    if (x_hat.data != nullptr) x_hat.store<T>(i * dim + d, T(unit));
    weighted.store<T>(i * dim + d, T(factor * unit));
  }
}

// dx = P_x(others * x_sum + target * w_hat_y). One warp per row.
template <class T>
NF_KERNEL(kThreads)
grad_features_kernel(StoredArray x, StoredArray w,        // [N, D], [C, D]
                     const T* __restrict__ inverse_norm,  // [C]
                     const int64_t* __restrict__ labels,  // [N]
                     int64_t dim, RowState rows,
                     const double* __restrict__ gradients,  // [kGradientFields, N]
                     const T* __restrict__ x_sum,           // [N, D]
                     const T* __restrict__ class_sum,       // [D] or null
                     double eps,
                     StoredArray dx)  // [N, D]
{
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  const bool ignored = rows.at(kRowWeight, i) == 0.0;
  const int64_t label = ignored ? kElsewhere : labels[i];
  const double inverse = rows.at(kInverseNorm, i);
  const double others = gradients[kOthers * rows.batch + i], target = gradients[kTarget * rows.batch + i];
  const double uniform = gradients[kUniform * rows.batch + i];
  const auto gradient = [&](int64_t d) {
    return others * double(x_sum[i * dim + d]) +
           (label != kElsewhere ? target * (w.load<double>(label * dim + d) * double(inverse_norm[label]))
                                : 0.0) +
           (class_sum != nullptr ? uniform * double(class_sum[d]) : 0.0);
  };
  double radial = 0;
  if (!ignored)
    for (int64_t d = lane_id(); d < dim; d += kWarp)
      radial += x.load<double>(i * dim + d) * inverse * gradient(d);
  radial = warp_sum(radial);
  for (int64_t d = lane_id(); d < dim; d += kWarp) {
    const double y = ignored ? 0.0 : x.load<double>(i * dim + d) * inverse;
    double g = ignored ? 0.0 : math::normalize_vjp<double>(gradient(d), y, radial, inverse, 0.0);
    if (dx.type == int(ScalarType::Half)) g = held_finite<Half>(g, 1.0 / inverse, eps, 2);
    dx.store<double>(i * dim + d, g);
  }
}

// g[y_i] += target_i x_hat_i for the rows whose label lies in the chunk. The first row of a label adds
// for all rows that share it, in order, so no two warps write the same class. One warp per row.
template <class T>
NF_KERNEL(kThreads)
add_targets_kernel(StoredArray x, const int64_t* __restrict__ labels,  // [N, D], [N]
                   int64_t dim, int64_t first, int64_t width, RowState rows,
                   const double* __restrict__ gradients,  // [kGradientFields, N]
                   T* __restrict__ g)                     // [width, D]
{
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= rows.batch || rows.at(kRowWeight, i) == 0.0) return;  // the whole warp leaves
  const int64_t label = labels[i];
  if (label < first || label >= first + width) return;
  bool earlier = false;
  for (int64_t k = lane_id(); k < i; k += kWarp)  // a row that does not count has left above
    earlier = earlier || (labels[k] == label && rows.at(kRowWeight, k) != 0.0);
  if (warp_any(earlier)) return;
  T* out = g + (label - first) * dim;
  for (int64_t base = i - i % kWarp; base < rows.batch; base += kWarp) {
    const int64_t mine = base + lane_id();
    unsigned same = warp_ballot(mine < rows.batch && mine >= i && labels[mine] == label);
    for (; same != 0; same &= same - 1) {
      int lane = 0;
      while (((same >> lane) & 1u) == 0) ++lane;
      const int64_t k = base + lane;
      const double factor = gradients[kTarget * rows.batch + k] * rows.at(kInverseNorm, k);
      for (int64_t d = lane_id(); d < dim; d += kWarp) out[d] += T(factor * x.load<double>(k * dim + d));
    }
  }
}

}  // namespace
}  // namespace nf
