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

// The arguments that the sweeps of forward and backward share.
struct HeadArguments {
  Tensor x, weight, labels;
  std::optional<Tensor> scale;
  double scale_value;
  int64_t class_chunk;
  int64_t score_kernel;
  ScalarType operand;
  std::optional<Tensor> class_weight;
  int64_t classes_in_all;
  bool partial;
};

template <class T>
T* data_or_null(const Tensor& t) {
  return t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Shapes, types and buffers shared by forward and backward.
template <class T>
struct Head {
  const Tensor& x;
  const Tensor& weight;
  const Tensor& labels;
  Scale scale;
  Factors<T> class_weight;
  int64_t batch, dim, classes, classes_in_all, chunk;
  bool partial;       // one shard of the classes
  bool narrow;        // 16-bit operands
  bool tensor_cores;  // score_exp.cu
  ScalarType wide;    // sums, scores
  ScalarType score;   // operands of the scores
  ScalarType other;   // E and the operands it meets

  explicit Head(const HeadArguments& in)
      : x(in.x),
        weight(in.weight),
        labels(in.labels),
        scale(in.scale, in.scale_value),
        class_weight(in.class_weight),
        batch(x.size(0)),
        dim(x.size(1)),
        classes(weight.size(0)),
        classes_in_all(in.classes_in_all),
        chunk(std::max<int64_t>(1, std::min(in.class_chunk, classes))),
        partial(in.partial),
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
};

// The scores of the classes [first, first + width), of x_hat and w_hat. `scores` is where the cuBLAS path
// has them.
template <class T>
struct ChunkOfScores {
  const Head<T>& head;
  int64_t first, width, stride;
  const Tensor &x_hat, &w_hat, &scores;
  const RowState& rows;

  ChunkOfScores(const Head<T>& h, int64_t chunk_first, int64_t chunk_width, const Tensor& features,
                const Tensor& weights, const Tensor& place, const RowState& state)
      : head(h),
        first(chunk_first),
        width(chunk_width),
        stride(Head<T>::padded(chunk_width)),
        x_hat(features),
        w_hat(weights),
        scores(place),
        rows(state) {}

  // Makes the scores, where they are written at all, and raises kappa to the largest of them outside
  // the window of math/softmax.h; x_sum, if given, is rescaled with it.
  void raise_shift(Queue& queue, T* x_sum) const {
    if (!head.tensor_cores) {
      make_scores();
      update_shift(queue, {score_data(), width, stride, 1, false, first}, x_sum);
      return;
    }
    if constexpr (std::is_same_v<T, float>) {
      const int64_t splits = score_splits(queue, head.batch, width);
      const Tensor largest = head.buffer(splits, head.batch, ScalarType::Float);
      ScoreExp task = score_exp_task(nullptr);
      task.largest = static_cast<float*>(largest.mutable_data_ptr());
      score_largest(queue, task);
      update_shift(queue, {task.largest, splits, 1, head.batch, true, RowLogits<T>::kNoClass}, x_sum);
    }
  }

  // E into `e` (or nowhere); S and A into rows.
  void fold(Queue& queue, const Tensor& e, T* x_sum) const {
    raise_shift(queue, x_sum);
    const int64_t splits = head.tensor_cores ? score_splits(queue, head.batch, width)
                                             : (width + kColumnsPerBlock - 1) / kColumnsPerBlock;
    const Tensor partial = head.buffer(2 * splits, head.batch, ScalarType::Double);
    double* partials = static_cast<double*>(partial.mutable_data_ptr());
    exponentiate(queue, e, splits, partials);
    launch("add_partials", queue, add_partials_kernel, Grid{(head.batch + kThreads - 1) / kThreads}, kThreads,
           0, partials, splits, rows);
  }

  // E alone, again.
  void repeat(Queue& queue, const Tensor& e) const {
    if (!head.tensor_cores) make_scores();
    exponentiate(queue, e, (width + kColumnsPerBlock - 1) / kColumnsPerBlock, nullptr);
  }

 private:
  T* score_data() const { return static_cast<T*>(scores.mutable_data_ptr()); }

  void make_scores() const {
    multiply(head.x, {x_hat.const_data_ptr(), head.score, head.batch, head.dim, head.dim},
             Matrix{w_hat.const_data_ptr(), head.score, width, head.dim, head.dim}.transposed(),
             {scores.const_data_ptr(), head.wide, head.batch, width, stride});
  }

  ScoreExp score_exp_task(const Tensor* e) const {
    return {static_cast<const Half*>(x_hat.const_data_ptr()),
            static_cast<const Half*>(w_hat.const_data_ptr()),
            head.batch,
            head.dim,
            width,
            first,
            head.classes_in_all,
            head.label_data(),
            head.scale,
            rows,
            e != nullptr && e->numel() > 0 ? static_cast<BFloat16*>(e->mutable_data_ptr()) : nullptr,
            stride,
            nullptr,
            nullptr};
  }

  void update_shift(Queue& queue, const RowLogits<T>& logits, T* x_sum) const {
    launch("update_shift", queue, update_shift_kernel<T>, Grid{head.batch}, kThreads,
           shared_bytes<T>(kThreads / kWarp), logits, head.label_data(), head.classes_in_all, head.scale,
           rows, x_sum, head.dim);
  }

  void exponentiate(Queue& queue, const Tensor& e, int64_t splits, double* partials) const {
    if constexpr (std::is_same_v<T, float>) {
      if (head.tensor_cores) {
        ScoreExp task = score_exp_task(&e);
        task.partial = partials;
        return score_exp(queue, task);
      }
    }
    const size_t shared = shared_bytes<double>(kThreads / kWarp);
    const Grid grid{head.batch, splits};
    if (head.narrow)
      launch("exponentiate", queue, exponentiate_kernel<T, BFloat16>, grid, kThreads, shared, score_data(),
             static_cast<BFloat16*>(e.mutable_data_ptr()), width, stride, stride, first, head.label_data(),
             head.scale, rows, partials);
    else
      launch("exponentiate", queue, exponentiate_kernel<T, T>, grid, kThreads, shared, score_data(),
             static_cast<T*>(e.mutable_data_ptr()), width, stride, stride, first, head.label_data(),
             head.scale, rows, partials);
  }
};

struct SweepResult {
  Tensor rows, inverse_norm, x_sum, class_sum, stored;
};

// class_sum = sum of class_weight_j w_hat_j and, last, of class_weight_j.
template <class T>
void sum_classes(Queue& queue, const Head<T>& head, const T* inverse_norm, T* class_sum) {
  const int64_t D = head.dim, runs = std::min<int64_t>(head.classes, 8 * queue.multiprocessors());
  const int64_t columns = (D + 1 + kThreads - 1) / kThreads;
  const Tensor partial = head.buffer(runs, D + 1, ScalarType::Double);
  double* partials = data_or_null<double>(partial);
  launch("class_sum", queue, class_sum_kernel<T>, Grid{runs, columns}, kThreads, 0, StoredArray(head.weight),
         inverse_norm, head.classes, D, head.class_weight, partials);
  launch("add_class_sums", queue, add_class_sums_kernel<T>, Grid{columns}, kThreads, 0, partials, runs, D + 1,
         class_sum);
}

template <class T>
void prepare_rows(Queue& queue, const Head<T>& head, int64_t ignore_index, double eps, const double* shift,
                  const Factors<T>& sample_weight, const RowState& rows, const Tensor& x_hat) {
  launch("prepare_rows", queue, prepare_rows_kernel<T>, warp_per_row(head.batch), kThreads, 0,
         StoredArray(head.x), StoredArray(head.weight), head.label_data(), head.dim, head.classes,
         head.classes_in_all, head.partial, ignore_index, eps, head.scale, shift, sample_weight,
         head.class_weight, rows, StoredArray(x_hat));
}

template <class T>
SweepResult sweep(Queue& queue, const Head<T>& head, int64_t ignore_index, double eps, bool store,
                  bool need_x, bool need_class_sum, const Factors<T>& sample_weight, const double* shift) {
  const int64_t N = head.batch, D = head.dim, chunk = store ? std::max<int64_t>(1, head.classes) : head.chunk;
  const Tensor& x = head.x;
  SweepResult out{head.buffer(kRowFields, N, ScalarType::Double), device_empty(x, {head.classes}, head.wide),
                  need_x ? head.buffer(N, D, head.wide) : device_empty(x, {0}, head.wide),
                  device_empty(x, {need_class_sum ? D + 1 : 0}, head.wide),
                  device_empty(x, {store ? N * head.padded(head.classes) : 0}, head.other)};
  const RowState rows(out.rows);
  const Tensor x_hat = head.buffer(N, D, head.score);
  prepare_rows(queue, head, ignore_index, eps, shift, sample_weight, rows, x_hat);

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
    ChunkOfScores<T>(head, first, width, x_hat, w_hat, scores, rows)
        .fold(queue, e, first > 0 ? sum : nullptr);
    if (!need_x) continue;
    multiply(x, {e.const_data_ptr(), head.other, N, width, head.padded(width)},
             {(copies ? w_copy : w_hat).const_data_ptr(), head.other, width, D, D},
             {(first == 0 ? out.x_sum : part).const_data_ptr(), head.wide, N, D, D});
    if (first > 0)
      launch("accumulate", queue, accumulate_kernel<T>, Grid{(N * D + kThreads - 1) / kThreads}, kThreads, 0,
             static_cast<const T*>(part.const_data_ptr()), N * D, sum);
  }
  if (head.classes == 0 && need_x) torch::stable::zero_(out.x_sum);  // no chunk wrote it
  if (need_class_sum)
    sum_classes(queue, head, data_or_null<T>(out.inverse_norm), data_or_null<T>(out.class_sum));
  return out;
}

// kappa of every row as these classes alone would have it.
template <class T>
Tensor choose_shift(Queue& queue, const Head<T>& head, int64_t ignore_index, double eps) {
  const int64_t N = head.batch, D = head.dim;
  const Tensor state = head.buffer(kRowFields, N, ScalarType::Double);
  const RowState rows(state);
  const Tensor x_hat = head.buffer(N, D, head.score);
  prepare_rows(queue, head, ignore_index, eps, nullptr, Factors<T>(std::nullopt), rows, x_hat);
  const Tensor w_hat = head.buffer(head.chunk, D, head.score);
  const Tensor scores = head.buffer(head.tensor_cores ? 0 : N, head.padded(head.chunk), head.wide);
  for (int64_t first = 0; first < head.classes; first += head.chunk) {
    const int64_t width = std::min(head.chunk, head.classes - first);
    head.unit_weights(queue, first, width, eps, w_hat, nullptr, nullptr);
    ChunkOfScores<T>(head, first, width, x_hat, w_hat, scores, rows).raise_shift(queue, nullptr);
  }
  return torch::stable::clone(torch::stable::select(state, 0, kShift));
}

template <class T>
void grad_weight(Queue& queue, const Head<T>& head, const RowState& rows, const double* gradients,
                 const Tensor& inverse_norm, const Tensor& stored, double eps, bool smooth, Tensor& dw) {
  const int64_t N = head.batch, D = head.dim;
  const bool recompute = stored.numel() == 0;
  const int64_t chunk = recompute ? head.chunk : head.classes;
  const Tensor x_hat = head.buffer(recompute ? N : 0, D, head.score);
  const Tensor weighted = head.buffer(N, D, head.other);
  StoredArray unit(x_hat);
  if (!recompute) unit.data = nullptr;
  launch("weighted_features", queue, weighted_features_kernel<T>, warp_per_row(N), kThreads, 0,
         StoredArray(head.x), D, rows, gradients, unit, StoredArray(weighted));
  const Tensor uniform = device_empty(head.x, {smooth ? D : 0}, head.wide);
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
      ChunkOfScores<T>(head, first, width, x_hat, w_hat, scores, rows).repeat(queue, e);
    }
    multiply(head.x, Matrix{e.const_data_ptr(), head.other, N, width, head.padded(width)}.transposed(),
             {weighted.const_data_ptr(), head.other, N, D, D}, {g, head.wide, width, D, D});
    launch("add_targets", queue, add_targets_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(head.x),
           head.label_data(), D, first, width, rows, gradients, g);
    if (uniform.numel() > 0)
      launch("add_uniform", queue, add_uniform_kernel<T>, Grid{32 * queue.multiprocessors()}, kThreads, 0,
             data_or_null<T>(uniform), D, first, width * D, head.class_weight, g);
    project_rows(queue, {static_cast<const char*>(head.weight.const_data_ptr()) + first * D * item,
                         head.weight.scalar_type(), width, D, eps,
                         static_cast<const T*>(inverse_norm.const_data_ptr()) + first, g, out});
  }
}

template <class T>
void backward(Queue& queue, const Head<T>& head, const Tensor& grad_loss, const Tensor& rows_tensor,
              const Tensor& inverse_norm, const Tensor& x_sum, const Tensor& class_sum, const Tensor& stored,
              double eps, double smoothing, Tensor* dx, Tensor* dw, Tensor* dscale) {
  const RowState rows(rows_tensor);
  const Tensor gradients = head.buffer(kGradientFields, head.batch, ScalarType::Double);
  double* factors = data_or_null<double>(gradients);
  launch("row_gradients", queue, row_gradients_kernel<T>, Grid{1}, kThreads,
         shared_bytes<double>(kThreads / kWarp), static_cast<const T*>(grad_loss.const_data_ptr()),
         grad_loss.dim() == 1, smoothing / double(head.classes_in_all), rows, head.scale, factors,
         dscale != nullptr ? static_cast<double*>(dscale->mutable_data_ptr()) : nullptr);
  if (dx != nullptr)
    launch("grad_features", queue, grad_features_kernel<T>, warp_per_row(head.batch), kThreads, 0,
           StoredArray(head.x), StoredArray(head.weight),
           static_cast<const T*>(inverse_norm.const_data_ptr()), head.label_data(), head.dim, rows, factors,
           data_or_null<T>(x_sum), data_or_null<T>(class_sum), eps, StoredArray(*dx));
  if (dw != nullptr) grad_weight(queue, head, rows, factors, inverse_norm, stored, eps, smoothing > 0, *dw);
}

template <class F>
auto dispatch_wide(const Tensor& x, const F& f) {
  return accumulator(x.scalar_type()) == ScalarType::Double ? f.template operator()<double>()
                                                            : f.template operator()<float>();
}

void check_arguments(const char* op, const HeadArguments& in) {
  check_head(op, in.x, in.weight, in.partial ? 0 : 1);
  check_labels(op, in.labels, in.x.size(0));
  check_weights(op, "class_weight", in.class_weight, in.x, in.weight.size(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normface_sweep(
    Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> scale, double scale_value,
    int64_t ignore_index, double eps, int64_t class_chunk, bool store, bool need_x, bool need_class_sum,
    int64_t score_kernel, ScalarType operand, std::optional<Tensor> sample_weight,
    std::optional<Tensor> class_weight, int64_t classes_in_all, bool partial, std::optional<Tensor> shift) {
  const char* op = "normface_sweep";
  const HeadArguments in{x,           weight,       labels,  scale,        scale_value,
                         class_chunk, score_kernel, operand, class_weight, classes_in_all,
                         partial};
  check_arguments(op, in);
  check_weights(op, "sample_weight", sample_weight, x, x.size(0));
  check_shift(op, shift, x.size(0));
  Queue queue(x);
  const SweepResult out = dispatch_wide(x, [&]<class T>() {
    return sweep(queue, Head<T>(in), ignore_index, eps, store, need_x, need_class_sum,
                 Factors<T>(sample_weight), data_or_null<double>(shift));
  });
  return {out.rows, out.inverse_norm, out.x_sum, out.class_sum, out.stored};
}

Tensor normface_shift(Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> scale, double scale_value,
                      int64_t ignore_index, double eps, int64_t class_chunk, int64_t score_kernel,
                      ScalarType operand, int64_t classes_in_all, bool partial) {
  const HeadArguments in{x,           weight,       labels,  scale,        scale_value,
                         class_chunk, score_kernel, operand, std::nullopt, classes_in_all,
                         partial};
  check_arguments("normface_shift", in);
  Queue queue(x);
  return dispatch_wide(x, [&]<class T>() { return choose_shift(queue, Head<T>(in), ignore_index, eps); });
}

std::tuple<Tensor, Tensor> normface_finish(Tensor rows, Tensor x, Tensor class_sum,
                                           std::optional<Tensor> scale, double scale_value, double m1,
                                           double m2, double m3, int64_t reduction, double smoothing,
                                           int64_t classes_in_all) {
  check_finish("normface_finish", rows, x, class_sum, smoothing);
  Queue queue(x);
  const int64_t N = x.size(0), D = x.size(1);
  const ScalarType wide = accumulator(x.scalar_type());
  const Tensor finished = device_empty(x, {kRowFields, N}, ScalarType::Double);
  const Tensor loss = reduction == kNone ? device_empty(x, {N}, wide) : device_empty(x, {}, wide);
  const RowState swept(rows), state(finished);
  dispatch_wide(x, [&]<class T>() {
    const T* sums = data_or_null<const T>(class_sum);
    if (sums != nullptr)
      launch("dot_class_sum", queue, dot_class_sum_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(x),
             sums, D, swept, state);
    launch("finish_loss", queue, finish_loss_kernel<T>, Grid{1}, kThreads,
           shared_bytes<double>(kThreads / kWarp), swept, state, Scale(scale, scale_value),
           Margin{m1, m2, m3}, reduction, smoothing, classes_in_all, sums != nullptr ? sums + D : nullptr,
           data_or_null<T>(loss));
  });
  return {loss, finished};
}

std::tuple<Tensor, Tensor, Tensor> normface_backward(
    Tensor grad_loss, Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> scale, double scale_value,
    double eps, int64_t class_chunk, Tensor rows, Tensor inverse_norm, Tensor x_sum, Tensor class_sum,
    Tensor stored, bool need_x, bool need_weight, bool need_scale, int64_t score_kernel, ScalarType operand,
    std::optional<Tensor> class_weight, double smoothing, int64_t classes_in_all, bool partial) {
  const char* op = "normface_backward";
  const HeadArguments in{x,           weight,       labels,  scale,        scale_value,
                         class_chunk, score_kernel, operand, class_weight, classes_in_all,
                         partial};
  check_arguments(op, in);
  check_shape(op, "rows", rows, kRowFields, x.size(0));
  if (need_x) check_shape(op, "x_sum", x_sum, x.size(0), x.size(1));
  Queue queue(x);
  const ScalarType x_type = partial ? accumulator(x.scalar_type()) : x.scalar_type();
  Tensor dx = need_x ? device_empty(x, {x.size(0), x.size(1)}, x_type) : device_empty(x, {0}, x_type);
  Tensor dw = need_weight ? torch::stable::empty_like(weight) : device_empty(x, {0}, weight.scalar_type());
  Tensor ds = need_scale ? device_empty(x, {}, ScalarType::Double) : device_empty(x, {0}, ScalarType::Double);
  dispatch_wide(x, [&]<class T>() {
    backward(queue, Head<T>(in), grad_loss, rows, inverse_norm, x_sum, class_sum, stored, eps, smoothing,
             need_x ? &dx : nullptr, need_weight ? &dw : nullptr, need_scale ? &ds : nullptr);
  });
  return {dx, dw, ds};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  m.impl("normface_sweep", TORCH_BOX(&nf::normface_sweep));
  m.impl("normface_shift", TORCH_BOX(&nf::normface_shift));
  m.impl("normface_finish", TORCH_BOX(&nf::normface_finish));
  m.impl("normface_backward", TORCH_BOX(&nf::normface_backward));
}
