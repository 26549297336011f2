// The backward of the engine on CUDA, with a second sweep over the classes for dW, and for x_sum where the first
// one did not make it; the products are made as in head_sweep.cu.
#include "cuda/device/add_runs.cuh"
#include "cuda/device/backward_kernels.cuh"
#include "cuda/host/add_product.cuh"
#include "cuda/host/outputs.h"
#include "cuda/products/sm80_weight_gradient.h"

namespace nf {
namespace {

// What the second sweep needs of the rows.
struct RowFactors {
  Tensor gradients;   // [kGradientFields, N]
  Tensor x_hat;       // [N, D], operand type, where scores are made again
  Tensor weighted;    // [N, D], type of what meets E, with dW
  Tensor sweep_rows;  // [N] of SweepRow, as int64, for the single sweep

  const double* of(GradientField field) const {
    return data_of<const double>(gradients) + field * gradients.size(1);
  }
};

template <class T>
struct WeightGradients {
  const Head<T>& head;
  const RowFactors& factors;
  const Tensor& inverse_norm;
  const Tensor& uniform;  // [D] or [0]
  const Tensor& dw;

  ClassGradient classes(const Chunk& of) const {
    const HeadInputs& in = head.in;
    return {StoredArray(in.x),
            data_of<const int64_t>(in.labels),
            head.batch,
            head.dim,
            factors.of(kTarget),
            factors.of(kOuter),
            factors.of(kInner),
            StoredArray(in.weight),
            inverse_norm.const_data_ptr(),
            of.first,
            of.width,
            data_of<T>(uniform),
            Factors<T>(in.class_weight).data,
            in.eps,
            StoredArray(dw),
            head.dim % 4 == 0 && aligned16(data_of<void>(in.weight)) && aligned16(data_of<void>(dw))};
  }

  // From E of a chunk.
  void from_e(Queue& queue, const Chunk& of, const Tensor& e, const Tensor& buffer) const {
    const int64_t N = head.batch, D = head.dim;
    if constexpr (std::is_same_v<T, float>) {
      if (head.kernels == kTensorCores)
        return weight_gradient(queue, {data_of<const BFloat16>(e), of.stride(),
                                       data_of<const BFloat16>(factors.weighted), classes(of)});
    }
    if (head.plain_products())
      return plain_gradient<T>(
          queue, {data_of<const T>(e), of.stride(), data_of<const T>(factors.weighted), classes(of)});
    T* g = buffer.numel() > 0 ? data_of<T>(buffer) : data_of<T>(dw) + of.first * D;
    multiply(head.in.x, Matrix{e.const_data_ptr(), head.other, N, of.width, of.stride()}.transposed(),
             {factors.weighted.const_data_ptr(), head.other, N, D, D}, {g, head.wide, of.width, D, D});
    launch("class_gradients", queue, class_gradients_kernel<T>,
           Grid{(of.width + kClassesPerBlock - 1) / kClassesPerBlock}, kThreads,
           shared_bytes<int>(kClassesPerBlock), classes(of), g);
  }

  // From unit rows of the classes, without E.
  void at_once(Queue& queue, const Chunk& of, const Tensor& w_hat) const {
    sweep_gradient(queue, {data_of<const Half>(w_hat), data_of<const Half>(factors.x_hat),
                           data_of<const BFloat16>(factors.weighted),
                           data_of<const SweepRow>(factors.sweep_rows), classes(of)});
  }
};

// dW, where `dw` is not null, and x_sum, where that is not empty.
template <class T>
void sweep_again(Queue& queue, Head<T> head, const HeadBackwardArguments& in, const RowFactors& factors,
                 const Tensor* dw, const Tensor& x_sum) {
  const int64_t N = head.batch, D = head.dim;
  if (D == 0) return;  // no gradient has an element
  const bool again = in.stored.numel() == 0, sum = x_sum.numel() > 0;
  if (!again) head.chunk = std::max<int64_t>(1, head.classes);
  const bool at_once = head.single_sweep();
  const bool smooth = dw != nullptr && in.class_sum.numel() > 0;
  const Tensor uniform = device_empty(in.x, {smooth ? D : 0}, head.wide);
  if (smooth) {
    const int64_t runs = (N + kUniformRun - 1) / kUniformRun;
    const Tensor partial = head.buffer(runs, D, ScalarType::Double);
    launch("uniform_gradient", queue, uniform_gradient_kernel, Grid{runs, thread_per(D).x}, kThreads, 0,
           StoredArray(in.x), N, D, factors.of(kOthers), data_of<double>(partial));
    add_runs(queue, data_of<const double>(partial), runs, D, data_of<T>(uniform));
  }

  // Unit rows as score operands and as what meets E: in the wide types they are the same.
  const bool copy = sum && head.is_16_bit;
  const Tensor w_hat = head.buffer(again || (sum && !copy) ? head.chunk : 0, D, head.score);
  const Tensor w_copy = head.buffer(copy ? head.chunk : 0, D, head.other);
  const int64_t stride = head.largest_chunk().stride();
  const Tensor scores = head.buffer(again && !head.tensor_cores() ? N : 0, stride, head.wide);
  const Tensor e = !again           ? in.stored
                   : head.is_16_bit ? head.buffer(at_once ? 0 : N, stride, head.other)
                                    : scores;
  const Tensor part = head.buffer(sum && head.chunk < head.classes ? N : 0, D, head.wide);
  // Where the product cannot go where the result will be.
  const bool direct = dw == nullptr || dw->scalar_type() == head.wide || head.kernels == kTensorCores ||
                      at_once || head.plain_products();
  const Tensor buffer = head.buffer(direct ? 0 : head.chunk, D, head.wide);
  const TermRows rows = head.term_rows(factors.of(kKappa), in.threshold ? factors.of(kThreshold) : nullptr);
  const SweepSums no_sums{RowState(in.rows), nullptr, nullptr};
  for (int64_t first = 0; first < head.classes; first += head.chunk) {
    const Chunk of = head.at(first);
    if (again || sum) unit_rows(queue, head.unit_weights(of, w_hat, w_copy, nullptr));
    if (again && !at_once) {
      if (!head.tensor_cores() && !head.plain_products()) head.make_scores(of, factors.x_hat, w_hat, scores);
      head.coefficients(queue, of, factors.x_hat, w_hat, scores, rows, no_sums, e);
    }
    if (sum) add_product(queue, head, of, e, copy ? w_copy : w_hat, x_sum, part);
    if (dw == nullptr) continue;
    const WeightGradients<T> task{head, factors, in.inverse_norm, uniform, *dw};
    if (!at_once) {
      task.from_e(queue, of, e, buffer);
    } else if constexpr (std::is_same_v<T, float>) {
      task.at_once(queue, of, w_hat);
    }
  }
  if (sum && head.classes == 0) {
    Tensor zeros = x_sum;
    torch::stable::zero_(zeros);  // no chunk wrote it
  }
}

template <class T>
void backward(Queue& queue, const HeadBackwardArguments& in, const Tensor& dx, const Tensor& dw,
              const Tensor& dscale) {
  const int64_t N = in.x.size(0), D = in.x.size(1);
  const bool make_sum = in.need_x && in.x_sum.numel() == 0 && N * D > 0;
  const Held held = make_sum ? Held::kE : Held::kNothing;
  const Head<T> head(in, launch_of(in.kName, queue, in, in.stored.numel() > 0, held));
  check_stored(in, head.other, N * Chunk{0, head.classes}.stride());
  const bool again = (in.need_weight || make_sum) && in.stored.numel() == 0;
  const RowFactors factors{head.buffer(kGradientFields, N, ScalarType::Double),
                           head.buffer(again ? N : 0, D, head.score),
                           head.buffer(in.need_weight ? N : 0, D, head.other),
                           device_empty(in.x, {head.single_sweep() ? 2 * N : 0}, ScalarType::Long)};
  const Tensor own_sum = head.buffer(make_sum ? N : 0, D, head.wide);
  const auto or_null = [](const Tensor& t, bool wanted) { return wanted ? StoredArray(t) : StoredArray(); };
  double* gradients = data_of<double>(factors.gradients);
  FeatureGradients<T> features{StoredArray(in.x),
                               StoredArray(in.weight),
                               data_of<const T>(in.inverse_norm),
                               data_of<const int64_t>(in.labels),
                               N,
                               D,
                               head.classes,
                               in.is_shard,
                               gradients,
                               data_of<const T>(make_sum ? own_sum : in.x_sum),
                               data_of<const T>(in.class_sum),
                               in.eps,
                               or_null(dx, in.need_x && !make_sum)};
  const bool of_rows = in.need_scale && in.scale && in.scale->dim() == 1;  // the scale's gradient, as it is
  launch("row_gradients", queue, row_gradients_kernel<T>, warp_per_row(N), kThreads, 0,
         RowGradients<T>{RowState(in.rows), RowSlopes(in.slopes), RowNumbers(in.scale, in.scale_value),
                         data_or_null<double>(in.threshold), data_of<const T>(in.grad_loss),
                         in.grad_loss.dim() == 1, gradients,
                         of_rows ? data_of<double>(dscale) : gradients + kScale * N, features,
                         or_null(factors.x_hat, again), or_null(factors.weighted, in.need_weight),
                         data_of<SweepRow>(factors.sweep_rows)});
  if (in.need_scale && !of_rows)
    launch("scale_gradient", queue, scale_gradient_kernel, Grid{1}, kThreads,
           shared_bytes<double>(kThreads / kWarp), gradients, N, data_of<double>(dscale));
  if (in.need_weight || make_sum)
    sweep_again(queue, head, in, factors, in.need_weight ? &dw : nullptr, own_sum);
  if (!make_sum) return;
  features.dx = StoredArray(dx);
  launch("feature_gradients", queue, feature_gradients_kernel<T>, warp_per_row(N), kThreads, 0, features);
}

std::tuple<Tensor, Tensor, Tensor> head_backward(const HeadBackwardArguments& in) {
  check_backward(in);
  const Tensor& x = in.x;
  Queue queue(x);
  const auto empty = [&](ScalarType type) { return device_empty(x, {0}, type); };
  Tensor dx = in.need_x || !in.is_shard ? partial_gradient_like(x, in.need_x, in.is_shard)
                                        : empty(accumulator(x.scalar_type()));
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
