// The backward of the fused head on CUDA; the products are made as in head_sweep.cu.
#include "cuda/device/backward_kernels.cuh"
#include "cuda/device/exponentiate.cuh"
#include "cuda/products/sm80_weight_gradient.h"

namespace nf {
namespace {

// What dW needs of the rows.
struct RowFactors {
  Tensor gradients;   // [kGradientFields, N]
  Tensor x_hat;       // [N, D], operand type, where scores are made again
  Tensor weighted;    // [N, D], type of what meets E
  Tensor sweep_rows;  // [N] of SweepRow, as int64, for the single sweep

  const double* of(GradientField field) const {
    return static_cast<const double*>(gradients.const_data_ptr()) + field * gradients.size(1);
  }
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
    return {StoredArray(head.x),
            head.label_data(),
            head.batch,
            head.dim,
            factors.of(kTarget),
            factors.of(kOuter),
            factors.of(kInner),
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
    sweep_gradient(
        queue, {static_cast<const Half*>(w_hat.const_data_ptr()),
                static_cast<const Half*>(factors.x_hat.const_data_ptr()),
                static_cast<const BFloat16*>(factors.weighted.const_data_ptr()),
                static_cast<const SweepRow*>(factors.sweep_rows.const_data_ptr()), classes(first, width)});
  }
};

// E of the classes [first, first + width), once more.
template <class T>
void repeat_e(Queue& queue, const Head<T>& head, int64_t first, int64_t width, const RowFactors& factors,
              const Tensor& w_hat, const RowState& rows, const Tensor& scores, const Tensor& e) {
  const Tensor& x_hat = factors.x_hat;
  const double* kappa = factors.of(kKappa);
  if constexpr (std::is_same_v<T, float>) {
    if (head.tensor_cores())
      return score_exp(queue, head.score_exp_task(first, width, x_hat, w_hat, kappa, rows, &e));
  }
  if (head.plain_products())
    return plain_scores(queue, head.plain_scores_task(first, width, x_hat, w_hat, kappa, rows, e));
  head.make_scores(width, x_hat, w_hat, scores);
  exponentiate(queue, head, first, width, scores, e, kappa, rows, nullptr, nullptr);
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
           kThreads, 0, StoredArray(head.x), N, D, factors.of(kOthers), data_or_null<T>(uniform));

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
    if (recompute) repeat_e(queue, head, first, width, factors, w_hat, rows, scores, e);
    task.from_e(queue, first, width, e, buffer);
  }
}

template <class T>
void backward(Queue& queue, const HeadBackwardArguments& in, const Tensor& dx, Tensor& dw,
              const Tensor& dscale) {
  const Head<T> head(in, launch_of(in.kName, queue, in, in.stored.numel() > 0));
  const int64_t N = head.batch, D = head.dim;
  const RowState rows(in.rows);
  const bool recompute = in.need_weight && in.stored.numel() == 0;
  const RowFactors factors{head.buffer(kGradientFields, N, ScalarType::Double),
                           head.buffer(recompute ? N : 0, D, head.score),
                           head.buffer(in.need_weight ? N : 0, D, head.other),
                           device_empty(head.x, {head.single_sweep() ? 2 * N : 0}, ScalarType::Long)};
  const auto or_null = [](const Tensor& t, bool wanted) { return wanted ? StoredArray(t) : StoredArray(); };
  double* gradients = data_or_null<double>(factors.gradients);
  const bool of_rows = in.need_scale && head.scale.per_row;  // the scale's gradient, as it is
  launch("row_gradients", queue, row_gradients_kernel<T>, warp_per_row(N), kThreads, 0,
         RowGradients<T>{
             StoredArray(head.x), StoredArray(head.weight),
             static_cast<const T*>(in.inverse_norm.const_data_ptr()), head.label_data(), D, rows,
             RowSlopes(in.slopes), head.scale, static_cast<const T*>(in.grad_loss.const_data_ptr()),
             in.grad_loss.dim() == 1, gradients,
             of_rows ? data_or_null<double>(dscale) : gradients + kScale * N, data_or_null<T>(in.x_sum),
             data_or_null<T>(in.class_sum), in.eps, or_null(dx, in.need_x), or_null(factors.x_hat, recompute),
             or_null(factors.weighted, in.need_weight), data_or_null<SweepRow>(factors.sweep_rows)});
  if (in.need_scale && !of_rows)
    launch("scale_gradient", queue, scale_gradient_kernel, Grid{1}, kThreads,
           shared_bytes<double>(kThreads / kWarp), gradients, N,
           static_cast<double*>(dscale.mutable_data_ptr()));
  if (in.need_weight)
    grad_weight(queue, head, rows, factors, in.inverse_norm, in.stored, in.eps, in.class_sum.numel() > 0, dw);
}

std::tuple<Tensor, Tensor, Tensor> head_backward(const HeadBackwardArguments& in) {
  check_backward(in);
  const Tensor& x = in.x;
  Queue queue(x);
  const ScalarType x_type = in.is_shard ? accumulator(x.scalar_type()) : x.scalar_type();
  const auto empty = [&](ScalarType type) { return device_empty(x, {0}, type); };
  Tensor dx = in.need_x ? device_empty(x, {x.size(0), x.size(1)}, x_type) : empty(x_type);
  Tensor dw = in.need_weight ? torch::stable::empty_like(in.weight) : empty(in.weight.scalar_type());
  Tensor ds = !in.need_scale                     ? empty(ScalarType::Double)
              : in.scale && in.scale->dim() == 1 ? device_empty(x, {x.size(0)}, ScalarType::Double)
                                                 : device_empty(x, {}, ScalarType::Double);
  dispatch_accumulator(x.scalar_type(), [&]<class T>() { backward<T>(queue, in, dx, dw, ds); });
  return {dx, dw, ds};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) { nf::implement<&nf::head_backward>(m); }
