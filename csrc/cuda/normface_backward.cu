// The backward of the fused head on CUDA; the products are made as in normface_sweep.cu.
#include "backward_kernels.cuh"
#include "exponentiate.cuh"
#include "weight_gradient.h"

namespace nf {
namespace {

// What dW needs of the rows.
struct RowFactors {
  Tensor gradients;   // [kGradientFields, N]
  Tensor x_hat;       // [N, D], operand type, where scores are made again
  Tensor weighted;    // [N, D], type of what meets E
  Tensor sweep_rows;  // [N, rounded up to even] of SweepRow, as int64, for the single sweep
};

template <class T>
struct WeightGradients {
  const Head<T>& head;
  const RowState& rows;
  const RowFactors& factors;
  const Tensor& inverse_norm;
  const Tensor& uniform;  // [D] or [0]
  double eps;
  Tensor& dw;

  ClassGradient classes(int64_t first, int64_t width) const {
    const auto of_weight = [](const Tensor& t) { return static_cast<const void*>(t.const_data_ptr()); };
    const auto* of_rows = static_cast<const double*>(factors.gradients.const_data_ptr());
    return {StoredArray(head.x),
            head.label_data(),
            head.batch,
            head.dim,
            of_rows + kTarget * head.batch,
            of_rows + kOuter * head.batch,
            of_rows + kInner * head.batch,
            StoredArray(head.weight),
            inverse_norm.const_data_ptr(),
            first,
            width,
            data_or_null<T>(uniform),
            head.class_weight.data,
            eps,
            StoredArray(dw),
            head.dim % 4 == 0 && aligned16(of_weight(head.weight)) && aligned16(of_weight(dw))};
  }

  // From E of the classes [first, first + width).
  void from_e(Queue& queue, int64_t first, int64_t width, const Tensor& e, const Tensor& buffer) const {
    const int64_t N = head.batch, D = head.dim, stride = head.padded(width);
    if constexpr (std::is_same_v<T, float>) {
      if (head.kernels == kTensorCores)
        return weight_gradient(
            queue, {static_cast<const BFloat16*>(e.const_data_ptr()), stride,
                    static_cast<const BFloat16*>(factors.weighted.const_data_ptr()), classes(first, width)});
    }
    if (head.plain_products())
      return plain_gradient(queue, PlainGradient<T>{static_cast<const T*>(e.const_data_ptr()), stride,
                                                    static_cast<const T*>(factors.weighted.const_data_ptr()),
                                                    classes(first, width)});
    T* g = buffer.numel() > 0 ? static_cast<T*>(buffer.mutable_data_ptr())
                              : static_cast<T*>(dw.mutable_data_ptr()) + first * D;
    multiply(head.x, Matrix{e.const_data_ptr(), head.other, N, width, stride}.transposed(),
             {factors.weighted.const_data_ptr(), head.other, N, D, D}, {g, head.wide, width, D, D});
    launch("class_gradients", queue, class_gradients_kernel<T>,
           Grid{(width + kClassesPerBlock - 1) / kClassesPerBlock}, kThreads,
           shared_bytes<int>(kClassesPerBlock), classes(first, width), g);
  }

  // From unit rows of the classes, without E.
  void at_once(Queue& queue, int64_t first, int64_t width, const Tensor& w_hat) const {
    sweep_gradient(queue, {static_cast<const Half*>(w_hat.const_data_ptr()),
                           static_cast<const Half*>(factors.x_hat.const_data_ptr()),
                           static_cast<const BFloat16*>(factors.weighted.const_data_ptr()),
                           static_cast<const SweepRow*>(factors.sweep_rows.const_data_ptr()), head.scale,
                           classes(first, width)});
  }
};

// E of the classes [first, first + width), once more.
template <class T>
void repeat_e(Queue& queue, const Head<T>& head, int64_t first, int64_t width, const Tensor& x_hat,
              const Tensor& w_hat, const RowState& rows, const Tensor& scores, const Tensor& e) {
  if constexpr (std::is_same_v<T, float>) {
    if (head.tensor_cores())
      return score_exp(queue, head.score_exp_task(first, width, x_hat, w_hat, rows, &e));
  }
  if (head.plain_products())
    return plain_scores(queue, head.plain_scores_task(first, width, x_hat, w_hat, rows, e));
  head.make_scores(width, x_hat, w_hat, scores);
  exponentiate(queue, head, first, width, scores, e, rows, nullptr, nullptr);
}

template <class T>
void grad_weight(Queue& queue, const Head<T>& head, const RowState& rows, const RowFactors& factors,
                 const Tensor& inverse_norm, const Tensor& stored, double eps, bool smooth, Tensor& dw) {
  const int64_t N = head.batch, D = head.dim;
  const bool recompute = stored.numel() == 0;
  const int64_t chunk = recompute ? head.chunk : head.classes;
  const Tensor uniform = device_empty(head.x, {smooth ? D : 0}, head.wide);
  if (smooth)
    launch("uniform_gradient", queue, uniform_gradient_kernel<T>, Grid{(D + kThreads - 1) / kThreads},
           kThreads, 0, StoredArray(head.x), D, rows,
           static_cast<const double*>(factors.gradients.const_data_ptr()), data_or_null<T>(uniform));

  const Tensor w_hat = head.buffer(recompute ? chunk : 0, D, head.score);
  const Tensor scores = head.buffer(recompute && !head.tensor_cores() ? N : 0, head.padded(chunk), head.wide);
  const bool need_e = recompute && head.is_16_bit && !head.single_sweep();
  const Tensor e = !recompute       ? stored
                   : head.is_16_bit ? head.buffer(need_e ? N : 0, head.padded(chunk), head.other)
                                    : scores;
  // Where the product cannot go where the result will be.
  const bool direct = head.weight.scalar_type() == head.wide || head.kernels == kTensorCores ||
                      head.single_sweep() || head.plain_products();
  const Tensor buffer = head.buffer(direct ? 0 : chunk, D, head.wide);
  const WeightGradients<T> task{head, rows, factors, inverse_norm, uniform, eps, dw};
  for (int64_t first = 0; first < head.classes; first += chunk) {
    const int64_t width = std::min(chunk, head.classes - first);
    if (recompute) unit_rows(queue, head.unit_weights(first, width, eps, w_hat, nullptr, nullptr));
    if (head.single_sweep()) {
      if constexpr (std::is_same_v<T, float>) task.at_once(queue, first, width, w_hat);
      continue;
    }
    if (recompute) repeat_e(queue, head, first, width, factors.x_hat, w_hat, rows, scores, e);
    task.from_e(queue, first, width, e, buffer);
  }
}

template <class T>
void backward(Queue& queue, const Head<T>& head, const Tensor& grad_loss, const Tensor& rows_tensor,
              const Tensor& inverse_norm, const Tensor& x_sum, const Tensor& class_sum, const Tensor& stored,
              double eps, double smoothing, Tensor* dx, Tensor* dw, Tensor* dscale) {
  const int64_t N = head.batch, D = head.dim;
  const RowState rows(rows_tensor);
  const bool recompute = dw != nullptr && stored.numel() == 0;
  const RowFactors factors{
      head.buffer(kGradientFields, N, ScalarType::Double), head.buffer(recompute ? N : 0, D, head.score),
      head.buffer(dw != nullptr ? N : 0, D, head.other),
      device_empty(head.x, {head.single_sweep() ? (N + 1) / 2 * 2 : 0}, ScalarType::Long)};
  const auto or_null = [](const Tensor& t, bool wanted) { return wanted ? StoredArray(t) : StoredArray(); };
  double* gradients = data_or_null<double>(factors.gradients);
  launch("row_gradients", queue, row_gradients_kernel<T>, warp_per_row(N), kThreads, 0,
         RowGradients<T>{StoredArray(head.x), StoredArray(head.weight),
                         static_cast<const T*>(inverse_norm.const_data_ptr()), head.label_data(), D, rows,
                         head.scale, static_cast<const T*>(grad_loss.const_data_ptr()), grad_loss.dim() == 1,
                         smoothing / double(head.total_classes), gradients, data_or_null<T>(x_sum),
                         data_or_null<T>(class_sum), eps, dx != nullptr ? StoredArray(*dx) : StoredArray(),
                         or_null(factors.x_hat, recompute), or_null(factors.weighted, dw != nullptr),
                         data_or_null<SweepRow>(factors.sweep_rows)});
  if (dscale != nullptr)
    launch("scale_gradient", queue, scale_gradient_kernel, Grid{1}, kThreads,
           shared_bytes<double>(kThreads / kWarp), gradients, N,
           static_cast<double*>(dscale->mutable_data_ptr()));
  if (dw != nullptr) grad_weight(queue, head, rows, factors, inverse_norm, stored, eps, smoothing > 0, *dw);
}

std::tuple<Tensor, Tensor, Tensor> normface_backward(
    Tensor grad_loss, Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> scale, double scale_value,
    double eps, int64_t class_chunk, Tensor rows, Tensor inverse_norm, Tensor x_sum, Tensor class_sum,
    Tensor stored, bool need_x, bool need_weight, bool need_scale, int64_t kernels,
    ScalarType product_precision, std::optional<Tensor> class_weight, double smoothing, int64_t total_classes,
    bool is_shard) {
  const char* op = "normface_backward";
  const HeadArguments in{x,
                         weight,
                         labels,
                         scale,
                         scale_value,
                         class_chunk,
                         kernels,
                         product_precision,
                         class_weight,
                         total_classes,
                         is_shard};
  check_arguments(op, in);
  check_shape(op, "rows", rows, kRowFields, x.size(0));
  if (need_x) check_shape(op, "x_sum", x_sum, x.size(0), x.size(1));
  Queue queue(x);
  const ScalarType x_type = is_shard ? accumulator(x.scalar_type()) : x.scalar_type();
  Tensor dx = need_x ? device_empty(x, {x.size(0), x.size(1)}, x_type) : device_empty(x, {0}, x_type);
  Tensor dw = need_weight ? torch::stable::empty_like(weight) : device_empty(x, {0}, weight.scalar_type());
  Tensor ds = need_scale ? device_empty(x, {}, ScalarType::Double) : device_empty(x, {0}, ScalarType::Double);
  dispatch_accumulator(x.scalar_type(), [&]<class T>() {
    backward(queue, Head<T>(in), grad_loss, rows, inverse_norm, x_sum, class_sum, stored, eps, smoothing,
             need_x ? &dx : nullptr, need_weight ? &dw : nullptr, need_scale ? &ds : nullptr);
  });
  return {dx, dw, ds};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) { m.impl("normface_backward", TORCH_BOX(&nf::normface_backward)); }
