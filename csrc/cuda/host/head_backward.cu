// The backward of the engine on CUDA, with a second sweep over the classes for dW, and for x_sum where the first
// one did not make it; the products are made as in head_sweep.cu.
#include "cuda/device/add_runs.cuh"
#include "cuda/device/backward_kernels.cuh"
#include "cuda/device/class_rows.cuh"
#include "cuda/device/hot_targets.cuh"
#include "cuda/host/add_product.cuh"
#include "cuda/host/head_stages.h"
#include "cuda/host/outputs.h"
#include "cuda/host/update_rows.h"
#include "cuda/products/sm90_single_sweep.h"
#include "cuda/products/sm90_weight_gradient.h"

namespace nf {
namespace {

// What is to be made.
struct Wanted {
  bool x, weight, scale;
  const HeadUpdateArguments* update;  // or null: what the weight's gradient goes into, instead of dW
};

// What the second sweep needs of the rows.
struct RowFactors {
  int64_t batch;
  Array gradients;   // [kGradientFields, N]
  Array x_hat;       // [N, D], operand type, where scores are made again
  Array weighted;    // [N, D], type of what meets E, with dW
  Array sweep_rows;  // [N] of SweepRow, as int64, for the single sweep
  Array powers;      // [N, up to a multiple of 4], of sm80_tf32x3.h's dW

  const double* of(GradientField field) const { return data_of<const double>(gradients) + field * batch; }
};

// The memory of the op, but for what the rows' factors are.
struct BackwardScratch {
  Block block;
  RowFactors factors;
  Array uniform, uniform_partial;  // [D], and [runs, D] of it, with label smoothing
  Array w_hat, w_copy;             // [chunk, D], as score operands and as what meets E
  Array scores, e;                 // [N, stride of a chunk]
  Array x_sum, x_part;             // [N, D], where the first sweep did not make it, and part_cells of it
  Array product;                   // [chunk, D], where the product cannot go where the result will be
  Array update_dw;                 // [chunk, D], as the weight: rows of the gradient where there is no dW
  HotRoom hot;                     // with dW

  template <class T>
  BackwardScratch(const Queue& queue, const Head<T>& head, const HeadBackwardTensors& in,
                  const Wanted& wanted, bool make_sum) {
    const int64_t N = head.batch, D = head.dim, cells = N * head.largest_chunk().stride();
    const bool again = (wanted.weight || make_sum) && in.stored.numel() == 0;
    const bool at_once = head.single_sweep(), copy = make_sum && head.is_16_bit;
    factors = {
        N,
        block.array<double>(kGradientFields * N),
        block.array(again ? N * D : 0, head.score),
        block.array(wanted.weight ? N * D : 0, head.other),
        block.array<int64_t>(at_once ? 2 * N : 0),
        block.array<float>(wanted.weight && head.makers.gradient == Maker::kTf32 ? (N + 3) / 4 * 4 : 0)};
    if (wanted.weight && in.class_sum.numel() > 0) {
      uniform = block.array(D, head.wide);
      uniform_partial = block.array<double>(uniform_runs(N) * D);
    }
    w_hat = block.array(again || (make_sum && !copy) ? head.chunk * D : 0, head.score);
    w_copy = block.array(copy ? head.chunk * D : 0, head.other);
    scores = block.array(again && !head.tensor_cores() ? cells : 0, head.wide);
    e = in.stored.numel() > 0                   ? Array(in.stored)
        : head.is_16_bit || head.tensor_cores() ? block.array(again && !at_once ? cells : 0, head.other)
                                                : scores;
    x_sum = block.array(make_sum ? N * D : 0, head.wide);
    x_part = block.array(make_sum ? head.part_cells(queue) : 0, head.wide);
    const bool direct = !wanted.weight || in.weight.scalar_type() == head.wide || head.own_gradient();
    product = block.array(direct ? 0 : head.chunk * D, head.wide);
    if (wanted.weight) hot = HotRoom(block, N, D);
    update_dw = block.array(wanted.update != nullptr ? head.chunk * D : 0, in.weight.scalar_type());
    allocate(block, in.x);
  }

  static int64_t uniform_runs(int64_t batch) { return (batch + kUniformRun - 1) / kUniformRun; }
};

template <class T>
struct WeightGradients {
  const Head<T>& head;
  const RowFactors& factors;
  const Tensor& inverse_norm;
  const Array& uniform;  // [D] or [0]
  const Array& dw;       // [C, D], or only the classes from dw_first on
  int64_t dw_first;
  HotTargets hot;

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
            dw_first,
            head.dim % 4 == 0 && aligned16(data_of<void>(in.weight)) && aligned16(data_of<void>(dw)),
            hot};
  }

  // From the product of a chunk, which lies in memory.
  void finish_product(Queue& queue, const ClassGradient& task, T* g) const {
    dispatch_stored(head.in.weight.scalar_type(), [&]<class S>() {
      if constexpr (std::is_same_v<accum_t<S>, T>)
        dispatch_rows<kVectorOf<T>>(task.vectors && aligned16(g), task.dim, [&]<class Shape>() {
          const int64_t of_block =
              classes_of_block(queue, task.batch, task.width, kRowsPerBlock * Shape::kRows);
          launch("class_gradients", queue, class_gradients_kernel<S, Shape>,
                 Grid{(task.width + of_block - 1) / of_block}, kThreads, shared_bytes<int>(of_block), task, g,
                 of_block);
        });
    });
  }

  // From E of a chunk, whose rows are `stride` long.
  void from_e(Queue& queue, const Chunk& of, void* e, int64_t stride, const Array& product) const {
    const int64_t N = head.batch, D = head.dim;
    if constexpr (std::is_same_v<T, float>) {
      if (head.makers.gradient == Maker::kSm80 || head.makers.gradient == Maker::kSm90) {
        const WeightGradient task{static_cast<const BFloat16*>(e), stride, of.stride(),
                                  data_of<const BFloat16>(factors.weighted), classes(of)};
        const bool wgmma = head.makers.gradient == Maker::kSm90 && takes_sm90_weight_gradient(task);
        return wgmma ? sm90_weight_gradient(queue, task) : weight_gradient(queue, task);
      }
      if (head.makers.gradient == Maker::kTf32)
        return tf32_gradient(
            queue, {static_cast<const float*>(e), stride, of.stride(), data_of<const float>(factors.weighted),
                    data_of<const float>(factors.powers), classes(of)});
    }
    if (head.plain_products())
      return plain_gradient<T>(queue, {static_cast<const T*>(e), stride, of.stride(),
                                       data_of<const T>(factors.weighted), classes(of)});
    T* g = product.count() > 0 ? data_of<T>(product) : data_of<T>(dw) + (of.first - dw_first) * D;
    multiply(head.in.x, Matrix{e, head.other, N, of.width, stride}.transposed(),
             {factors.weighted.data(), head.other, N, D, D}, {g, head.wide, of.width, D, D});
    finish_product(queue, classes(of), g);
  }

  // From unit rows of the classes, without E.
  void at_once(Queue& queue, const Chunk& of, const Array& w_hat) const {
    const auto run = head.makers.gradient == Maker::kSm90 ? sm90_sweep_gradient : sweep_gradient;
    run(queue, {data_of<const Half>(w_hat), data_of<const Half>(factors.x_hat),
                data_of<const BFloat16>(factors.weighted), data_of<const SweepRow>(factors.sweep_rows),
                classes(of)});
  }
};

// The weight's gradient, where it is wanted, and x_sum, where there is room for it.
template <class T>
void sweep_again(Queue& queue, const Head<T>& head, const HeadBackwardTensors& in, const Wanted& wanted,
                 const BackwardScratch& scratch, const Array& dw) {
  const int64_t N = head.batch, D = head.dim;
  if (D == 0) return;  // no gradient has an element
  const RowFactors& factors = scratch.factors;
  const Array &w_hat = scratch.w_hat, &w_copy = scratch.w_copy, &e = scratch.e;
  const bool again = in.stored.numel() == 0, sum = scratch.x_sum.count() > 0;
  const bool at_once = head.single_sweep();
  const int64_t stored_stride = Chunk{0, head.classes}.stride();
  const HeadUpdateArguments* update = wanted.update;
  if (scratch.uniform.count() > 0) {
    const int64_t runs = BackwardScratch::uniform_runs(N);
    double* partial = data_of<double>(scratch.uniform_partial);
    launch("uniform_gradient", queue, uniform_gradient_kernel, Grid{runs, thread_per(D).x}, kThreads, 0,
           StoredArray(in.x), N, D, factors.of(kOthers), partial);
    add_runs<T>(queue, partial, runs, D, data_of<T>(scratch.uniform));
  }

  const TermRows rows = head.term_rows(factors.of(kKappa), in.threshold ? factors.of(kThreshold) : nullptr);
  const SweepSums no_sums{RowState(in.rows), nullptr, nullptr};
  const auto gradients_from = [&](int64_t dw_first) {
    return WeightGradients<T>{head, factors,  in.inverse_norm,      scratch.uniform,
                              dw,   dw_first, scratch.hot.targets()};
  };
  if (scratch.hot.wanted()) find_hot_targets(queue, gradients_from(0).classes({0, 0}));
  for (int64_t first = 0; first < head.classes; first += head.chunk) {
    const Chunk of = head.at(first);
    if (again || sum) unit_rows(queue, head.unit_weights(of, w_hat, w_copy, nullptr));
    if (again && !at_once) {
      if (!head.tensor_cores() && !head.plain_products())
        head.make_scores(of, factors.x_hat, w_hat, scratch.scores);
      head.coefficients(queue, of, factors.x_hat, w_hat, scratch.scores, rows, no_sums, e);
    }
    if (sum)
      add_product<T>(queue, head, of, e, w_copy.count() > 0 ? w_copy : w_hat, scratch.x_sum, scratch.x_part);
    if (!wanted.weight) continue;
    const WeightGradients<T> task = gradients_from(update != nullptr ? first : 0);
    if (!at_once) {
      const int64_t before = again ? 0 : first * int64_t(in.stored.element_size());
      task.from_e(queue, of, data_of<char>(e) + before, again ? of.stride() : stored_stride, scratch.product);
    } else if constexpr (std::is_same_v<T, float>) {
      task.at_once(queue, of, w_hat);
    }
    // Nothing reads these rows of the weight any more: the next chunk has others.
    if (update != nullptr) update_rows(queue, *update, first, of.width, dw);
  }
  if (sum && head.classes == 0) {
    Tensor zeros = as_tensor({scratch.x_sum.data(), head.wide, N, D, D}, in.x);
    torch::stable::zero_(zeros);  // no chunk wrote it
  }
}

template <class T>
void backward(Queue& queue, const char* op, const HeadBackwardTensors& in, const Wanted& wanted,
              const Tensor& dx, const Tensor& dw, const Tensor& dscale) {
  const int64_t N = in.x.size(0), D = in.x.size(1);
  const bool make_sum = wanted.x && in.x_sum.numel() == 0 && N * D > 0;
  const Held held = make_sum ? Held::kE : Held::kNothing;
  Head<T> head(in, launch_of(op, queue, in, in.stored.numel() > 0, held));
  if (in.stored.numel() > 0) head.chunk = std::max<int64_t>(1, head.classes);
  check_stored(op, in, head.other, N * Chunk{0, head.classes}.stride());
  if (wanted.update != nullptr) head.chunk = std::min(head.chunk, classes_of_update(in));
  const bool again = (wanted.weight || make_sum) && in.stored.numel() == 0;
  const BackwardScratch scratch(queue, head, in, wanted, make_sum);
  const RowFactors& factors = scratch.factors;
  const auto or_null = [](const Array& a, bool wanted) { return wanted ? StoredArray(a) : StoredArray(); };
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
                               make_sum ? data_of<const T>(scratch.x_sum) : data_of<const T>(in.x_sum),
                               data_of<const T>(in.class_sum),
                               in.eps,
                               or_null(dx, wanted.x && !make_sum)};
  const bool of_rows = wanted.scale && in.scale && in.scale->dim() == 1;  // the scale's gradient, as it is
  constexpr bool kMayHavePowers = std::is_same_v<T, float>;
  launch(
      "row_gradients", queue,
      factors.powers.count() > 0 ? row_gradients_kernel<T, kMayHavePowers> : row_gradients_kernel<T, false>,
      warp_per_row(N), kThreads, 0,
      RowGradients<T>{RowState(in.rows), RowSlopes(in.slopes), RowNumbers(in.scale, in.scale_value),
                      data_or_null<double>(in.threshold), data_of<const T>(in.grad_loss),
                      in.grad_loss.dim() == 1, gradients,
                      of_rows ? data_of<double>(dscale) : gradients + kScale * N, features,
                      or_null(factors.x_hat, again), or_null(factors.weighted, wanted.weight),
                      data_of<SweepRow>(factors.sweep_rows), data_of<float>(factors.powers)});
  if (wanted.scale && !of_rows)
    launch("scale_gradient", queue, scale_gradient_kernel, Grid{1}, kThreads,
           shared_bytes<double>(kThreads / kWarp), gradients, N, data_of<double>(dscale));
  if (wanted.weight || make_sum)
    sweep_again(queue, head, in, wanted, scratch, wanted.update != nullptr ? scratch.update_dw : Array(dw));
  if (!make_sum) return;
  features.dx = StoredArray(dx);
  launch("feature_gradients", queue, feature_gradients_kernel<T>, warp_per_row(N), kThreads, 0, features);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gradients_of(const HeadBackwardArguments& in) {
  const Tensor& x = in.x;
  Queue queue(x);
  const auto empty = [&](ScalarType type) { return device_empty(x, {0}, type); };
  Tensor dx = in.need_x || !in.is_shard ? partial_gradient_like(x, in.need_x, in.is_shard)
                                        : empty(accumulator(x.scalar_type()));
  Tensor dw = in.need_weight ? torch::stable::empty_like(in.weight) : empty(in.weight.scalar_type());
  Tensor ds = !in.need_scale                     ? empty(ScalarType::Double)
              : in.scale && in.scale->dim() == 1 ? device_empty(x, {x.size(0)}, ScalarType::Double)
                                                 : device_empty(x, {}, ScalarType::Double);
  const Wanted wanted{in.need_x, in.need_weight, in.need_scale, nullptr};
  dispatch_accumulator(x.scalar_type(),
                       [&]<class T>() { backward<T>(queue, in.kName, in, wanted, dx, dw, ds); });
  return {dx, dw, ds};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> head_backward(const HeadBackwardArguments& in) {
  check_backward(in.kName, in);
  return gradients_of(in);
}

void head_backward_update(const HeadUpdateArguments& in) {
  check_update(in);
  Queue queue(in.x);
  // Without the features' gradient, which reads the rows of the labels.
  const Wanted wanted{false, true, false, &in};
  dispatch_accumulator(in.x.scalar_type(),
                       [&]<class T>() { backward<T>(queue, in.kName, in, wanted, in.x, in.weight, in.x); });
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  nf::implement<&nf::head_backward>(m);
  nf::implement<&nf::head_backward_update>(m);
}
