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
#include "loss_kernels.cuh"
#include "rows.h"
#include "score_exp.h"

namespace nf {
namespace {

// The arguments that forward and backward share.
struct LossArguments {
  Tensor x, weight, labels;
  std::optional<Tensor> scale;
  double scale_value;
  double eps;
  int64_t class_chunk;
  int64_t score_kernel;
  ScalarType operand;
  std::optional<Tensor> sample_weight, class_weight;
  double smoothing;
};

template <class T>
T* data_or_null(const Tensor& t) {
  return t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <class T>
T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->const_data_ptr()) : nullptr;
}

// Shapes, types and buffers shared by forward and backward.
template <class T>
struct Head {
  const Tensor& x;
  const Tensor& weight;
  const Tensor& labels;
  Scale scale;
  Weighting<T> weighting;
  int64_t batch, dim, classes, chunk;
  bool narrow;        // 16-bit operands
  bool tensor_cores;  // score_exp.cu
  ScalarType wide;    // sums, scores
  ScalarType score;   // operands of the scores
  ScalarType other;   // E and the operands it meets

  explicit Head(const LossArguments& in)
      : x(in.x),
        weight(in.weight),
        labels(in.labels),
        scale(in.scale, in.scale_value),
        weighting{data_or_null<const T>(in.sample_weight), data_or_null<const T>(in.class_weight),
                  in.smoothing},
        batch(x.size(0)),
        dim(x.size(1)),
        classes(weight.size(0)),
        chunk(std::clamp<int64_t>(in.class_chunk, 1, classes)),
        narrow(in.operand == ScalarType::Half || in.operand == ScalarType::BFloat16),
        tensor_cores(narrow && in.score_kernel == kTensorCoreScores),
        wide(accumulator(x.scalar_type())),
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

struct ForwardResult {
  Tensor loss, rows, inverse_norm, x_sum, class_sum, stored;
};

// class_sum = sum of class_weight_j w_hat_j, and what the rows need of it.
template <class T>
void sum_classes(Queue& queue, const Head<T>& head, const RowState& rows, const T* inverse_norm,
                 T* class_sum) {
  const int64_t D = head.dim, runs = std::min<int64_t>(head.classes, 8 * queue.multiprocessors());
  const int64_t columns = (D + kThreads - 1) / kThreads;
  const Tensor partial = head.buffer(runs, D, ScalarType::Double);
  double* partials = data_or_null<double>(partial);
  launch("class_sum", queue, class_sum_kernel<T>, Grid{runs, columns}, kThreads, 0, StoredArray(head.weight),
         inverse_norm, head.classes, D, head.weighting, partials);
  launch("add_class_sums", queue, add_class_sums_kernel<T>, Grid{columns}, kThreads, 0, partials, runs, D,
         class_sum);
  launch("dot_class_sum", queue, dot_class_sum_kernel<T>, warp_per_row(head.batch), kThreads, 0,
         StoredArray(head.x), class_sum, D, rows);
}

template <class T>
ForwardResult forward(Queue& queue, const Head<T>& head, const Margin& margin, int64_t reduction,
                      int64_t ignore_index, double eps, bool store, bool need_x) {
  const int64_t N = head.batch, D = head.dim, chunk = store ? head.classes : head.chunk;
  const Tensor& x = head.x;
  const bool smooth = head.weighting.smoothing > 0;
  ForwardResult out{reduction == kNone ? device_empty(x, {N}, head.wide) : device_empty(x, {}, head.wide),
                    head.buffer(kRowFields, N, ScalarType::Double),
                    device_empty(x, {head.classes}, head.wide),
                    need_x ? head.buffer(N, D, head.wide) : device_empty(x, {0}, head.wide),
                    device_empty(x, {smooth ? D : 0}, head.wide),
                    device_empty(x, {store ? N * head.padded(head.classes) : 0}, head.other)};
  const RowState rows(out.rows);

  const Tensor x_hat = head.buffer(N, D, head.score);
  launch("prepare_rows", queue, prepare_rows_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(x),
         StoredArray(head.weight), head.label_data(), D, head.classes, ignore_index, eps, head.scale, margin,
         head.weighting, rows, StoredArray(x_hat));

  const Tensor w_hat = head.buffer(chunk, D, head.score);
  const bool copies = head.narrow && need_x;
  const bool need_e = need_x || store || !head.tensor_cores;
  const Tensor w_copy = head.buffer(copies ? chunk : 0, D, head.other);
  // In the wide types E replaces the scores, so stored E is where they are written.
  const bool in_place = !head.narrow;
  const Tensor scores =
      store && in_place ? out.stored : head.buffer(head.tensor_cores ? 0 : N, head.padded(chunk), head.wide);
  const Tensor e = store      ? out.stored
                   : in_place ? scores
                              : head.buffer(need_e ? N : 0, head.padded(chunk), head.other);
  T* sum = data_or_null<T>(out.x_sum);
  const Tensor part = head.buffer(need_x && chunk < head.classes ? N : 0, D, head.wide);
  for (int64_t first = 0; first < head.classes; first += chunk) {
    const int64_t width = std::min(chunk, head.classes - first);
    head.unit_weights(queue, first, width, eps, w_hat, copies ? &w_copy : nullptr, &out.inverse_norm);
    head.scores_to_e(queue, first, width, x_hat, w_hat, scores, e, rows, true, first > 0 ? sum : nullptr);
    if (!need_x) continue;
    multiply(x, {e.const_data_ptr(), head.other, N, width, head.padded(width)},
             {(copies ? w_copy : w_hat).const_data_ptr(), head.other, width, D, D},
             {(first == 0 ? out.x_sum : part).const_data_ptr(), head.wide, N, D, D});
    if (first > 0)
      launch("accumulate", queue, accumulate_kernel<T>, Grid{(N * D + kThreads - 1) / kThreads}, kThreads, 0,
             static_cast<const T*>(part.const_data_ptr()), N * D, sum);
  }
  if (smooth)
    sum_classes(queue, head, rows, data_or_null<T>(out.inverse_norm), data_or_null<T>(out.class_sum));
  launch("finish_loss", queue, finish_loss_kernel<T>, Grid{1}, kThreads,
         shared_bytes<double>(kThreads / kWarp), rows, head.scale, reduction, head.classes, head.weighting,
         data_or_null<T>(out.loss));
  return out;
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
  const Tensor uniform = device_empty(head.x, {head.weighting.smoothing > 0 ? D : 0}, head.wide);
  if (uniform.numel() > 0)
    launch("uniform_gradient", queue, uniform_gradient_kernel<T>, Grid{(D + kThreads - 1) / kThreads},
           kThreads, 0, StoredArray(head.x), D, rows, gradients, data_or_null<T>(uniform));

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
    if (uniform.numel() > 0)
      launch("add_uniform", queue, add_uniform_kernel<T>, Grid{32 * queue.multiprocessors()}, kThreads, 0,
             data_or_null<T>(uniform), D, first, width * D, head.weighting, g);
    project_rows(queue, {static_cast<const char*>(head.weight.const_data_ptr()) + first * D * item,
                         head.weight.scalar_type(), width, D, eps,
                         static_cast<const T*>(inverse_norm.const_data_ptr()) + first, g, out});
  }
}

template <class T>
void backward(Queue& queue, const Head<T>& head, const Tensor& grad_loss, const Tensor& rows_tensor,
              const Tensor& inverse_norm, const Tensor& x_sum, const Tensor& class_sum, const Tensor& stored,
              double eps, Tensor* dx, Tensor* dw, Tensor* dscale) {
  const RowState rows(rows_tensor);
  const Tensor gradients = head.buffer(kGradientFields, head.batch, ScalarType::Double);
  double* factors = data_or_null<double>(gradients);
  launch("row_gradients", queue, row_gradients_kernel<T>, Grid{1}, kThreads,
         shared_bytes<double>(kThreads / kWarp), static_cast<const T*>(grad_loss.const_data_ptr()),
         grad_loss.dim() == 1, head.weighting.smoothing / double(head.classes), rows, head.scale, factors,
         dscale != nullptr ? static_cast<double*>(dscale->mutable_data_ptr()) : nullptr);
  if (dx != nullptr)
    launch("grad_features", queue, grad_features_kernel<T>, warp_per_row(head.batch), kThreads, 0,
           StoredArray(head.x), StoredArray(head.weight),
           static_cast<const T*>(inverse_norm.const_data_ptr()), head.label_data(), head.dim, rows, factors,
           data_or_null<T>(x_sum), data_or_null<T>(class_sum), StoredArray(*dx));
  if (dw != nullptr) grad_weight(queue, head, rows, factors, inverse_norm, stored, eps, *dw);
}

template <class F>
auto dispatch_wide(const Tensor& x, const F& f) {
  return accumulator(x.scalar_type()) == ScalarType::Double ? f.template operator()<double>()
                                                            : f.template operator()<float>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normface_loss(
    Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> scale, double scale_value, double m1,
    double m2, double m3, int64_t reduction, int64_t ignore_index, double eps, int64_t class_chunk,
    bool store, bool need_x, int64_t score_kernel, ScalarType operand, std::optional<Tensor> sample_weight,
    std::optional<Tensor> class_weight, double smoothing) {
  const char* op = "normface_loss";
  check_head(op, x, weight);
  check_labels(op, labels, x.size(0));
  check_weights(op, "sample_weight", sample_weight, x, x.size(0));
  check_weights(op, "class_weight", class_weight, x, weight.size(0));
  Queue queue(x);
  const LossArguments in{x,           weight,       labels,  scale,         scale_value,  eps,
                         class_chunk, score_kernel, operand, sample_weight, class_weight, smoothing};
  const ForwardResult out = dispatch_wide(x, [&]<class T>() {
    return forward(queue, Head<T>(in), {m1, m2, m3}, reduction, ignore_index, eps, store, need_x);
  });
  return {out.loss, out.rows, out.inverse_norm, out.x_sum, out.class_sum, out.stored};
}

std::tuple<Tensor, Tensor, Tensor> normface_loss_backward(
    Tensor grad_loss, Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> scale, double scale_value,
    double eps, int64_t class_chunk, Tensor rows, Tensor inverse_norm, Tensor x_sum, Tensor class_sum,
    Tensor stored, bool need_x, bool need_weight, bool need_scale, int64_t score_kernel, ScalarType operand,
    std::optional<Tensor> class_weight, double smoothing) {
  const char* op = "normface_loss_backward";
  check_head(op, x, weight);
  check_labels(op, labels, x.size(0));
  check_shape(op, "rows", rows, kRowFields, x.size(0));
  check_weights(op, "class_weight", class_weight, x, weight.size(0));
  if (need_x) check_shape(op, "x_sum", x_sum, x.size(0), x.size(1));
  Queue queue(x);
  Tensor dx = need_x ? torch::stable::empty_like(x) : device_empty(x, {0}, x.scalar_type());
  Tensor dw = need_weight ? torch::stable::empty_like(weight) : device_empty(x, {0}, weight.scalar_type());
  Tensor ds = need_scale ? device_empty(x, {}, ScalarType::Double) : device_empty(x, {0}, ScalarType::Double);
  // The sample weights are in the rows' weights by now.
  const LossArguments in{x,           weight,       labels,  scale,        scale_value,  eps,
                         class_chunk, score_kernel, operand, std::nullopt, class_weight, smoothing};
  dispatch_wide(x, [&]<class T>() {
    backward(queue, Head<T>(in), grad_loss, rows, inverse_norm, x_sum, class_sum, stored, eps,
             need_x ? &dx : nullptr, need_weight ? &dw : nullptr, need_scale ? &ds : nullptr);
  });
  return {dx, dw, ds};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  m.impl("normface_loss", TORCH_BOX(&nf::normface_loss));
  m.impl("normface_loss_backward", TORCH_BOX(&nf::normface_loss_backward));
}
