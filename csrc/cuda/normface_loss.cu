// The fused scaled softmax head on CUDA: products by cuBLAS, everything else in the kernels below;
// 16-bit scores, where the device and the shape allow it, by score_exp.cu instead. Classes are walked in
// chunks; see math/softmax.h for the formulas and row_state.h for what is kept per row.
//
// Operands. float32 and float64 stay what they are. With a 16-bit input the scores come from float16
// unit rows (their entries are bounded, so its 11 bits beat bfloat16's 8) and float32 sums; E, which
// spans e^-87 to e^88, is stored as bfloat16 and meets bfloat16 unit rows.
//
// The scale is read on the device and nothing is read back, so the host never waits.
#include <optional>

#include "gemm.h"
#include "math/margin.h"
#include "math/normalize.h"
#include "math/softmax.h"
#include "reduce.cuh"
#include "row_state.cuh"
#include "rows.h"
#include "score_exp.h"
#include "stored.cuh"

namespace nf {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;
constexpr int64_t kColumnsPerBlock = 4096;  // of a row of scores, per block of `exponentiate`

Grid warp_per_row(int64_t rows) { return {(rows + kRowsPerBlock - 1) / kRowsPerBlock}; }

struct Margin {
  double m1, m2, m3;
};

// Everything a row knows before the sweep: its norm, its target cosine (products and sums in double,
// from the raw rows), the margin, the shift. An ignored row becomes zero, so that nothing it holds, NaN
// included, reaches another row or a class. One warp per row.
template <class T>
NF_KERNEL(kThreads)
prepare_rows_kernel(StoredArray x, StoredArray w,        // [N, D], [C, D]
                    const int64_t* __restrict__ labels,  // [N]
                    int64_t dim, int64_t classes, int64_t ignore_index, double eps, Scale scale,
                    Margin margin, RowState rows,
                    StoredArray x_hat)  // [N, D], operand type
{
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  const int64_t label = labels[i];
  const bool ignored = label == ignore_index;
  NF_DEVICE_CHECK(
      ignored || (label >= 0 && label < classes),
      "normface_loss: expected `labels` in [0, %lld) or ignore_index (%lld), got %lld at row %lld",
      (long long)classes, (long long)ignore_index, (long long)label, (long long)i);
  double xx = 0, ww = 0, xw = 0;
  if (!ignored)
    for (int64_t d = lane_id(); d < dim; d += kWarp) {
      const double a = x.load<double>(i * dim + d), b = w.load<double>(label * dim + d);
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
  const double s = scale.value();
  const bool fixed = math::has_fixed_shift<T>(s, double(classes));
  const math::ValueAndSlope<double> psi =
      ignored ? math::ValueAndSlope<double>{0.0, 0.0}
              : math::Margin{margin.m1, margin.m2, margin.m3}(xw / x_norm / w_norm);
  rows.at(kShift, i) = fixed ? math::fixed_shift<T>(s, double(classes)) : -INFINITY;
  rows.at(kSum, i) = 0;
  rows.at(kSumCosine, i) = 0;
  rows.at(kPsi, i) = psi.value;
  rows.at(kPsiSlope, i) = psi.slope;
  rows.at(kInverseNorm, i) = inverse;
  rows.at(kRowWeight, i) = ignored ? 0.0 : 1.0;  // finish_loss_kernel divides by the count
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
                    int64_t classes, Scale scale, RowState rows,
                    T* __restrict__ x_sum,  // [N, D] or null
                    int64_t dim) {
  const double s = scale.value();
  if (math::has_fixed_shift<T>(s, double(classes))) return;
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

NF_DEVICE math::RowLoss row_loss(const RowState& rows, double scale, int64_t i) {
  return math::softmax_row(rows.at(kSum, i), rows.at(kShift, i), scale * rows.at(kPsi, i));
}

// sum[i] += part[i]
template <class T>
NF_KERNEL(kThreads)
accumulate_kernel(const T* __restrict__ part, int64_t count, T* __restrict__ sum) {
  const int64_t i = block_id() * kThreads + thread_id();
  if (i < count) sum[i] += part[i];
}

// Losses, their reduction, and the rows' final weights. One block: N is small, and the order is fixed.
template <class T>
NF_KERNEL(kThreads)
finish_loss_kernel(RowState rows, Scale scale, int64_t reduction,
                   T* __restrict__ loss)  // [N] or []
{
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  const double s = scale.value();
  double kept = 0, total = 0;
  for (int64_t i = thread_id(); i < rows.batch; i += kThreads) kept += rows.at(kRowWeight, i);
  kept = block_sum(kept, scratch);
  const double weight = reduction == kMean ? 1.0 / (kept > 1 ? kept : 1.0) : 1.0;
  for (int64_t i = thread_id(); i < rows.batch; i += kThreads) {
    const bool counts = rows.at(kRowWeight, i) != 0.0;
    const double weighted = counts ? weight * row_loss(rows, s, i).loss : 0.0;
    rows.at(kRowWeight, i) = counts ? weight : 0.0;
    if (reduction == kNone) loss[i] = T(weighted);
    total += weighted;
  }
  total = block_sum(total, scratch);
  if (reduction != kNone && thread_id() == 0) *loss = T(total);
}

// What row i contributes to the gradients (see the fields), upstream gradient and scale included.
enum GradientField { kOthers, kTarget, kGradientFields };

// Factors of every row, and d loss / d scale. One block, fixed order.
template <class T>
NF_KERNEL(kThreads)
row_gradients_kernel(const T* __restrict__ grad_loss,  // [N] or []
                     bool per_row, RowState rows, Scale scale,
                     double* __restrict__ gradients,   // [kGradientFields, N]
                     double* __restrict__ grad_scale)  // [] or null
{
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  const double s = scale.value();
  double total = 0;
  for (int64_t i = thread_id(); i < rows.batch; i += kThreads) {
    double others = 0, target = 0;
    if (rows.at(kRowWeight, i) != 0.0) {
      const double g = double(grad_loss[per_row ? i : 0]) * rows.at(kRowWeight, i);
      const math::RowLoss row = row_loss(rows, s, i);
      others = g * s * row.weight;
      target = -g * s * row.q * rows.at(kPsiSlope, i);
      total += g * math::softmax_scale_slope(row, rows.at(kSumCosine, i), rows.at(kPsi, i));
    }
    gradients[kOthers * rows.batch + i] = others;
    gradients[kTarget * rows.batch + i] = target;
  }
  total = block_sum(total, scratch);
  if (grad_scale != nullptr && thread_id() == 0) *grad_scale = total;
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
                     StoredArray dx)                        // [N, D]
{
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  const bool ignored = rows.at(kRowWeight, i) == 0.0;
  const int64_t label = ignored ? 0 : labels[i];
  const double inverse = rows.at(kInverseNorm, i);
  const double others = gradients[kOthers * rows.batch + i], target = gradients[kTarget * rows.batch + i];
  const auto gradient = [&](int64_t d) {
    return others * double(x_sum[i * dim + d]) +
           target * (w.load<double>(label * dim + d) * double(inverse_norm[label]));
  };
  double radial = 0;
  if (!ignored)
    for (int64_t d = lane_id(); d < dim; d += kWarp)
      radial += x.load<double>(i * dim + d) * inverse * gradient(d);
  radial = warp_sum(radial);
  for (int64_t d = lane_id(); d < dim; d += kWarp) {
    const double y = ignored ? 0.0 : x.load<double>(i * dim + d) * inverse;
    dx.store<double>(i * dim + d,
                     ignored ? 0.0 : math::normalize_vjp<double>(gradient(d), y, radial, inverse, 0.0));
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
  for (int64_t k = lane_id(); k < i; k += kWarp) earlier = earlier || labels[k] == label;
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

// Shapes, types and buffers shared by forward and backward.
template <class T>
struct Head {
  const Tensor& x;
  const Tensor& weight;
  const Tensor& labels;
  Scale scale;
  int64_t batch, dim, classes, chunk;
  bool narrow;        // 16-bit operands
  bool tensor_cores;  // score_exp.cu
  ScalarType wide;    // sums, scores
  ScalarType score;   // operands of the scores
  ScalarType other;   // E and the operands it meets

  Head(const Tensor& x_, const Tensor& weight_, const Tensor& labels_, const std::optional<Tensor>& scale_,
       double scale_value, int64_t class_chunk, int64_t score_kernel, ScalarType operand)
      : x(x_),
        weight(weight_),
        labels(labels_),
        scale(scale_, scale_value),
        batch(x_.size(0)),
        dim(x_.size(1)),
        classes(weight_.size(0)),
        chunk(class_chunk < 1         ? 1
              : class_chunk > classes ? classes
                                      : class_chunk),
        narrow(operand == ScalarType::Half || operand == ScalarType::BFloat16),
        tensor_cores(narrow && score_kernel == kTensorCoreScores),
        wide(accumulator(x_.scalar_type())),
        score(narrow ? ScalarType::Half : wide),
        other(narrow ? ScalarType::BFloat16 : wide) {}

  const int64_t* label_data() const { return static_cast<const int64_t*>(labels.const_data_ptr()); }

  // Rows of scores and of E begin at multiples of 16 bytes whatever C is.
  static int64_t padded(int64_t width) { return (width + 7) / 8 * 8; }

  Tensor buffer(int64_t rows, int64_t columns, ScalarType type) const {
    return device_empty(x, {rows, columns}, type);
  }

  // Unit rows of the classes [first, first + width): as score operands, and (with `copy`) as partners
  // of E; the inverse norms as well.
  void unit_weights(Queue& queue, int64_t first, int64_t width, double eps, const Tensor& w_hat,
                    const Tensor* copy, const Tensor* inverse) const {
    const char* rows = static_cast<const char*>(weight.const_data_ptr());
    UnitRows task{
        rows + first * dim * int64_t(weight.element_size()), weight.scalar_type(), width, dim, 2, eps};
    task.y = w_hat.mutable_data_ptr();
    task.y_type = score;
    if (copy != nullptr) task.copy = copy->mutable_data_ptr();
    if (inverse != nullptr) task.inverse = static_cast<T*>(inverse->mutable_data_ptr()) + first;
    unit_rows(queue, task);
  }

  // E of the classes [first, first + width) from x_hat and w_hat into `e`; with `sums`, S and A into rows,
  // and x_sum rescaled where kappa had to rise. `scores` is scratch of the cuBLAS path.
  void scores_to_e(Queue& queue, int64_t first, int64_t width, const Tensor& x_hat, const Tensor& w_hat,
                   const Tensor& scores, const Tensor& e, const RowState& rows, bool sums, T* x_sum) const {
    const int64_t stride = padded(width);
    const int64_t splits =
        tensor_cores ? score_splits(queue, batch, width) : (width + kColumnsPerBlock - 1) / kColumnsPerBlock;
    Tensor partial = device_empty(x, {sums ? 2 * splits * batch : 0}, ScalarType::Double);
    double* partials = sums ? static_cast<double*>(partial.mutable_data_ptr()) : nullptr;
    if constexpr (std::is_same_v<T, float>) {
      if (tensor_cores) {
        Tensor largest = device_empty(x, {sums ? splits * batch : 0}, ScalarType::Float);
        const ScoreExp task{static_cast<const Half*>(x_hat.const_data_ptr()),
                            static_cast<const Half*>(w_hat.const_data_ptr()),
                            batch,
                            dim,
                            width,
                            first,
                            classes,
                            label_data(),
                            scale,
                            rows,
                            e.numel() > 0 ? static_cast<BFloat16*>(e.mutable_data_ptr()) : nullptr,
                            stride,
                            partials,
                            sums ? static_cast<float*>(largest.mutable_data_ptr()) : nullptr};
        if (sums) {
          score_largest(queue, task);
          update_shift(queue, {task.largest, splits, 1, batch, true, RowLogits<T>::kNoClass}, rows, x_sum);
        }
        score_exp(queue, task);
        if (sums) add_partials(queue, partials, splits, rows);
        return;
      }
    }
    multiply(x, {x_hat.const_data_ptr(), score, batch, dim, dim},
             Matrix{w_hat.const_data_ptr(), score, width, dim, dim}.transposed(),
             {scores.const_data_ptr(), wide, batch, width, stride});
    T* from = static_cast<T*>(scores.mutable_data_ptr());
    if (sums) update_shift(queue, {from, width, stride, 1, false, first}, rows, x_sum);
    const size_t shared = shared_bytes<double>(kThreads / kWarp);
    if (narrow)
      launch("exponentiate", queue, exponentiate_kernel<T, BFloat16>, Grid{batch, splits}, kThreads, shared,
             from, static_cast<BFloat16*>(e.mutable_data_ptr()), width, stride, stride, first, label_data(),
             scale, rows, partials);
    else
      launch("exponentiate", queue, exponentiate_kernel<T, T>, Grid{batch, splits}, kThreads, shared, from,
             static_cast<T*>(e.mutable_data_ptr()), width, stride, stride, first, label_data(), scale, rows,
             partials);
    if (sums) add_partials(queue, partials, splits, rows);
  }

  void update_shift(Queue& queue, const RowLogits<T>& logits, const RowState& rows, T* x_sum) const {
    launch("update_shift", queue, update_shift_kernel<T>, Grid{batch}, kThreads,
           shared_bytes<T>(kThreads / kWarp), logits, label_data(), classes, scale, rows, x_sum, dim);
  }

  void add_partials(Queue& queue, const double* partial, int64_t splits, const RowState& rows) const {
    launch("add_partials", queue, add_partials_kernel, Grid{(batch + kThreads - 1) / kThreads}, kThreads, 0,
           partial, splits, rows);
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Queue& queue, const Head<T>& head,
                                                           const Margin& margin, int64_t reduction,
                                                           int64_t ignore_index, double eps, bool store,
                                                           bool need_x) {
  const int64_t N = head.batch, D = head.dim, chunk = store ? head.classes : head.chunk;
  const Tensor& x = head.x;
  Tensor loss = reduction == kNone ? device_empty(x, {N}, head.wide) : device_empty(x, {}, head.wide);
  Tensor rows_tensor = head.buffer(kRowFields, N, ScalarType::Double);
  Tensor inverse_norm = device_empty(x, {head.classes}, head.wide);
  Tensor x_sum = need_x ? head.buffer(N, D, head.wide) : device_empty(x, {0}, head.wide);
  Tensor stored = device_empty(x, {store ? N * head.padded(head.classes) : 0}, head.other);
  const RowState rows(rows_tensor);

  const Tensor x_hat = head.buffer(N, D, head.score);
  launch("prepare_rows", queue, prepare_rows_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(x),
         StoredArray(head.weight), head.label_data(), D, head.classes, ignore_index, eps, head.scale, margin,
         rows, StoredArray(x_hat));

  const Tensor w_hat = head.buffer(chunk, D, head.score);
  const bool copies = head.narrow && need_x;
  const bool need_e = need_x || store || !head.tensor_cores;
  const Tensor w_copy = head.buffer(copies ? chunk : 0, D, head.other);
  // In the wide types E replaces the scores, so stored E is where they are written.
  const bool in_place = !head.narrow;
  const Tensor scores =
      store && in_place ? stored : head.buffer(head.tensor_cores ? 0 : N, head.padded(chunk), head.wide);
  const Tensor e = store      ? stored
                   : in_place ? scores
                              : head.buffer(need_e ? N : 0, head.padded(chunk), head.other);
  T* sum = need_x && N * D > 0 ? static_cast<T*>(x_sum.mutable_data_ptr()) : nullptr;
  const Tensor part = head.buffer(need_x && chunk < head.classes ? N : 0, D, head.wide);
  for (int64_t first = 0; first < head.classes; first += chunk) {
    const int64_t width = std::min(chunk, head.classes - first);
    head.unit_weights(queue, first, width, eps, w_hat, copies ? &w_copy : nullptr, &inverse_norm);
    head.scores_to_e(queue, first, width, x_hat, w_hat, scores, e, rows, true, first > 0 ? sum : nullptr);
    if (!need_x) continue;
    multiply(x, {e.const_data_ptr(), head.other, N, width, head.padded(width)},
             {(copies ? w_copy : w_hat).const_data_ptr(), head.other, width, D, D},
             {(first == 0 ? x_sum : part).const_data_ptr(), head.wide, N, D, D});
    if (first > 0)
      launch("accumulate", queue, accumulate_kernel<T>, Grid{(N * D + kThreads - 1) / kThreads}, kThreads, 0,
             static_cast<const T*>(part.const_data_ptr()), N * D, sum);
  }
  launch("finish_loss", queue, finish_loss_kernel<T>, Grid{1}, kThreads,
         shared_bytes<double>(kThreads / kWarp), rows, head.scale, reduction,
         loss.numel() > 0 ? static_cast<T*>(loss.mutable_data_ptr()) : nullptr);
  return {loss, rows_tensor, inverse_norm, x_sum, stored};
}

template <class T>
void grad_weight(Queue& queue, const Head<T>& head, const RowState& rows, const double* gradients,
                 const Tensor& inverse_norm, const Tensor& stored, double eps, Tensor& dw) {
  const int64_t N = head.batch, D = head.dim;
  const bool recompute = stored.numel() == 0;
  const int64_t chunk = recompute ? head.chunk : head.classes;
  const Tensor x_hat = head.buffer(recompute ? N : 0, D, head.score);
  const Tensor weighted = head.buffer(N, D, head.other);
  StoredArray unit(x_hat);
  if (!recompute) unit.data = nullptr;
  launch("weighted_features", queue, weighted_features_kernel<T>, warp_per_row(N), kThreads, 0,
         StoredArray(head.x), D, rows, gradients, unit, StoredArray(weighted));

  const Tensor w_hat = head.buffer(recompute ? chunk : 0, D, head.score);
  const Tensor scores = head.buffer(recompute && !head.tensor_cores ? N : 0, head.padded(chunk), head.wide);
  const Tensor e = !recompute    ? stored
                   : head.narrow ? head.buffer(N, head.padded(chunk), head.other)
                                 : scores;
  const bool direct = head.weight.scalar_type() == head.wide;  // the product can go where the result will be
  const Tensor buffer = head.buffer(direct ? 0 : chunk, D, head.wide);
  const int64_t item = int64_t(head.weight.element_size());
  for (int64_t first = 0; first < head.classes; first += chunk) {
    const int64_t width = std::min(chunk, head.classes - first);
    char* out = static_cast<char*>(dw.mutable_data_ptr()) + first * D * item;
    T* g = direct ? reinterpret_cast<T*>(out) : static_cast<T*>(buffer.mutable_data_ptr());
    if (recompute) {
      head.unit_weights(queue, first, width, eps, w_hat, nullptr, nullptr);
      head.scores_to_e(queue, first, width, x_hat, w_hat, scores, e, rows, false, nullptr);
    }
    multiply(head.x, Matrix{e.const_data_ptr(), head.other, N, width, head.padded(width)}.transposed(),
             {weighted.const_data_ptr(), head.other, N, D, D}, {g, head.wide, width, D, D});
    launch("add_targets", queue, add_targets_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(head.x),
           head.label_data(), D, first, width, rows, gradients, g);
    project_rows(queue, {static_cast<const char*>(head.weight.const_data_ptr()) + first * D * item,
                         head.weight.scalar_type(), width, D, eps,
                         static_cast<const T*>(inverse_norm.const_data_ptr()) + first, g, out});
  }
}

template <class T>
void backward(Queue& queue, const Head<T>& head, const Tensor& grad_loss, const Tensor& rows_tensor,
              const Tensor& inverse_norm, const Tensor& x_sum, const Tensor& stored, double eps, Tensor* dx,
              Tensor* dw, Tensor* dscale) {
  const RowState rows(rows_tensor);
  const Tensor gradients = head.buffer(kGradientFields, head.batch, ScalarType::Double);
  double* factors = static_cast<double*>(gradients.mutable_data_ptr());
  launch("row_gradients", queue, row_gradients_kernel<T>, Grid{1}, kThreads,
         shared_bytes<double>(kThreads / kWarp), static_cast<const T*>(grad_loss.const_data_ptr()),
         grad_loss.dim() == 1, rows, head.scale, factors,
         dscale != nullptr ? static_cast<double*>(dscale->mutable_data_ptr()) : nullptr);
  if (dx != nullptr)
    launch("grad_features", queue, grad_features_kernel<T>, warp_per_row(head.batch), kThreads, 0,
           StoredArray(head.x), StoredArray(head.weight),
           static_cast<const T*>(inverse_norm.const_data_ptr()), head.label_data(), head.dim, rows, factors,
           static_cast<const T*>(x_sum.const_data_ptr()), StoredArray(*dx));
  if (dw != nullptr) grad_weight(queue, head, rows, factors, inverse_norm, stored, eps, *dw);
}

template <class F>
auto dispatch_wide(const Tensor& x, const F& f) {
  return accumulator(x.scalar_type()) == ScalarType::Double ? f.template operator()<double>()
                                                            : f.template operator()<float>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normface_loss(
    Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> scale, double scale_value, double m1,
    double m2, double m3, int64_t reduction, int64_t ignore_index, double eps, int64_t class_chunk,
    bool store, bool need_x, int64_t score_kernel, ScalarType operand) {
  check_head("normface_loss", x, weight);
  check_labels("normface_loss", labels, x.size(0));
  Queue queue(x);
  return dispatch_wide(x, [&]<class T>() {
    const Head<T> head(x, weight, labels, scale, scale_value, class_chunk, score_kernel, operand);
    return forward(queue, head, {m1, m2, m3}, reduction, ignore_index, eps, store, need_x);
  });
}

std::tuple<Tensor, Tensor, Tensor> normface_loss_backward(
    Tensor grad_loss, Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> scale, double scale_value,
    double eps, int64_t class_chunk, Tensor rows, Tensor inverse_norm, Tensor x_sum, Tensor stored,
    bool need_x, bool need_weight, bool need_scale, int64_t score_kernel, ScalarType operand) {
  const char* op = "normface_loss_backward";
  check_head(op, x, weight);
  check_labels(op, labels, x.size(0));
  check_shape(op, "rows", rows, kRowFields, x.size(0));
  if (need_x) check_shape(op, "x_sum", x_sum, x.size(0), x.size(1));
  Queue queue(x);
  Tensor dx = need_x ? torch::stable::empty_like(x) : device_empty(x, {0}, x.scalar_type());
  Tensor dw = need_weight ? torch::stable::empty_like(weight) : device_empty(x, {0}, weight.scalar_type());
  Tensor ds = need_scale ? device_empty(x, {}, ScalarType::Double) : device_empty(x, {0}, ScalarType::Double);
  dispatch_wide(x, [&]<class T>() {
    const Head<T> head(x, weight, labels, scale, scale_value, class_chunk, score_kernel, operand);
    backward(queue, head, grad_loss, rows, inverse_norm, x_sum, stored, eps, need_x ? &dx : nullptr,
             need_weight ? &dw : nullptr, need_scale ? &ds : nullptr);
  });
  return {dx, dw, ds};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  m.impl("normface_loss", TORCH_BOX(&nf::normface_loss));
  m.impl("normface_loss_backward", TORCH_BOX(&nf::normface_loss_backward));
}
