// The sweep of the fused head over the classes on CUDA, in chunks: products by cuBLAS or, for 16-bit operands
// where device and shape allow it, by the kernels for tensor cores (row_state.h: HeadKernels), everything
// else in forward_kernels.cuh. See math/softmax.h for the formulas and row_state.h for what is kept per row.
#include "cuda/device/forward_kernels.cuh"
#include "cuda/products/sm80_single_sweep.h"

namespace nf {
namespace {

// One run over the classes: what the chunks share.
template <class T>
struct Sweep {
  const Head<T>& head;
  double eps;
  bool final_shift;  // kappa stays as prepare() sets it: one constant, or that of all shards
  RowState rows;
  Tensor x_hat;     // [N, D], operand type
  Tensor arrivals;  // [N], counters of last_to_arrive
  Tensor w_hat;     // [chunk, D]
  Tensor w_copy;    // the same, as what meets E, or empty
  Tensor scores;    // [N, padded chunk], or empty where they are never written

  // Everything before the first product: the rows, and the unit rows of the first chunk.
  void prepare(Queue& queue, int64_t ignore_index, const double* shift, const Factors<T>& sample_weight,
               const Tensor* inverse_norm) const {
    const PrepareRows<T> task{StoredArray(head.x),
                              StoredArray(head.weight),
                              head.label_data(),
                              head.dim,
                              head.classes,
                              head.is_shard,
                              ignore_index,
                              eps,
                              head.scale,
                              head.window,
                              shift,
                              sample_weight,
                              head.class_weight,
                              rows,
                              StoredArray(x_hat),
                              static_cast<unsigned*>(arrivals.mutable_data_ptr())};
    const UnitRows classes = unit_weights(0, inverse_norm);
    const int64_t row_blocks = warp_per_row(head.batch).x;
    dispatch_stored(head.weight.scalar_type(), [&]<class S>() {
      if constexpr (std::is_same_v<accum_t<S>, T>)
        launch("prepare", queue,
               rows_are_aligned<S>(classes) ? prepare_kernel<T, S, kVectorOf<S>> : prepare_kernel<T, S, 1>,
               Grid{row_blocks + warp_per_row(classes.rows).x}, kThreads, 0, task, classes, row_blocks);
    });
  }

  int64_t width(int64_t first) const { return std::min(head.chunk, head.classes - first); }

  UnitRows unit_weights(int64_t first, const Tensor* inverse_norm) const {
    return head.unit_weights(first, width(first), eps, w_hat, w_copy.numel() > 0 ? &w_copy : nullptr,
                             inverse_norm);
  }

  // Makes the scores, where they are written at all, and raises kappa to the largest of them outside
  // the window of math/softmax.h; x_sum, if given, is rescaled with it.
  void raise_shift(Queue& queue, int64_t first, T* x_sum) const {
    const int64_t count = width(first);
    if (head.plain_products()) return;
    if (!head.tensor_cores()) {
      head.make_scores(count, x_hat, w_hat, scores);
      update_shift(queue, {score_data(), count, head.padded(count), 1, true, first}, x_sum);
      return;
    }
    if constexpr (std::is_same_v<T, float>) {
      if (final_shift) return;
      const int64_t splits = score_splits(queue, head.batch, head.dim, count);
      const Tensor largest = head.buffer(splits, head.batch, ScalarType::Float);
      ScoreExp task = head.score_exp_task(first, count, x_hat, w_hat, rows.of(kShift), rows, nullptr);
      task.largest = static_cast<float*>(largest.mutable_data_ptr());
      score_largest(queue, task);
      update_shift(queue, {task.largest, splits, 1, head.batch, false, 0}, x_sum);
    }
  }

  // E into `e` (or nowhere); S and A into rows.
  void fold(Queue& queue, int64_t first, const Tensor& e) const {
    const int64_t count = width(first);
    const int64_t splits = head.tensor_cores()     ? score_splits(queue, head.batch, head.dim, count)
                           : head.plain_products() ? plain_splits<T>(count)
                                                   : exponentiate_splits(count);
    const Tensor partial = head.buffer(2 * splits, head.batch, ScalarType::Double);
    double* partials = static_cast<double*>(partial.mutable_data_ptr());
    unsigned* counters = static_cast<unsigned*>(arrivals.mutable_data_ptr());
    if constexpr (std::is_same_v<T, float>) {
      if (head.tensor_cores()) {
        ScoreExp task = head.score_exp_task(first, count, x_hat, w_hat, rows.of(kShift), rows, &e);
        task.partial = partials;
        task.arrivals = counters;
        return score_exp(queue, task);
      }
    }
    if (head.plain_products()) {
      PlainScores<T> task = head.plain_scores_task(first, count, x_hat, w_hat, rows.of(kShift), rows, e);
      task.partial = partials;
      task.arrivals = counters;
      return plain_scores(queue, task);
    }
    exponentiate(queue, head, first, count, scores, e, rows.of(kShift), rows, partials, counters);
  }

  // S, A and x_sum in one kernel, without E.
  void fold_at_once(Queue& queue, int64_t first, const Tensor& x_sum) const {
    const int64_t count = width(first), splits = sweep_splits(queue, head.batch, head.dim, count);
    const Tensor partial = head.buffer(2 * splits, head.batch, ScalarType::Double);
    const Tensor x_partial = head.buffer(splits * head.batch, head.dim, ScalarType::Float);
    nf::single_sweep(
        queue,
        {static_cast<const Half*>(x_hat.const_data_ptr()), static_cast<const Half*>(w_hat.const_data_ptr()),
         static_cast<const BFloat16*>(w_copy.const_data_ptr()), head.batch, head.dim, count, first,
         head.label_data(), head.scale, rows, static_cast<float*>(x_partial.mutable_data_ptr()),
         static_cast<double*>(partial.mutable_data_ptr()),
         static_cast<unsigned*>(arrivals.mutable_data_ptr()), static_cast<float*>(x_sum.mutable_data_ptr()),
         first > 0});
  }

 private:
  T* score_data() const { return static_cast<T*>(scores.mutable_data_ptr()); }

  void update_shift(Queue& queue, const RowLogits<T>& logits, T* x_sum) const {
    if (final_shift) return;
    launch("update_shift", queue, update_shift_kernel<T>, Grid{head.batch}, kThreads,
           shared_bytes<T>(kThreads / kWarp), logits, head.label_data(), head.window, head.scale, rows, x_sum,
           head.dim);
  }
};

struct SweepResult {
  Tensor rows, inverse_norm, x_sum, class_sum, stored;
};

// class_sum = sum of class_weight_j w_hat_j and, last, of class_weight_j.
template <class T>
void sum_classes(Queue& queue, const Head<T>& head, const T* inverse_norm, double eps, T* class_sum) {
  const int64_t D = head.dim, runs = std::min<int64_t>(head.classes, 8 * queue.multiprocessors());
  const int64_t columns = (D + 1 + kThreads - 1) / kThreads;
  const Tensor partial = head.buffer(runs, D + 1, ScalarType::Double);
  double* partials = data_or_null<double>(partial);
  launch("class_sum", queue, class_sum_kernel<T>, Grid{runs, columns}, kThreads, 0, StoredArray(head.weight),
         inverse_norm, head.classes, D, T(eps), head.class_weight, partials);
  launch("add_class_sums", queue, add_class_sums_kernel<T>, Grid{columns}, kThreads, 0, partials, runs, D + 1,
         class_sum);
}

template <class T>
SweepResult sweep(Queue& queue, const HeadSweepArguments& in) {
  Head<T> head(in, launch_of(in.kName, queue, in, in.store));
  const bool store = in.store, need_x = in.need_x;
  if (store) head.chunk = std::max<int64_t>(1, head.classes);
  const int64_t N = head.batch, D = head.dim, chunk = head.chunk;
  const Tensor& x = head.x;
  SweepResult out{head.buffer(kRowFields, N, ScalarType::Double), device_empty(x, {head.classes}, head.wide),
                  need_x ? head.buffer(N, D, head.wide) : device_empty(x, {0}, head.wide),
                  device_empty(x, {in.need_class_sum ? D + 1 : 0}, head.wide),
                  device_empty(x, {store ? N * head.padded(head.classes) : 0}, head.other)};
  const bool at_once = head.single_sweep() && need_x;
  // In the wide types E replaces the scores, so stored E is where they are written.
  const bool in_place = !head.is_16_bit;
  const Tensor scores = store && in_place
                            ? out.stored
                            : head.buffer(head.tensor_cores() ? 0 : N, head.padded(chunk), head.wide);
  const bool need_e = !at_once && (need_x || !head.tensor_cores());
  const Tensor e = store      ? out.stored
                   : in_place ? scores
                              : head.buffer(need_e ? N : 0, head.padded(chunk), head.other);
  const Sweep<T> sweep{head,
                       in.eps,
                       head.fixed_shift || in.shift.has_value(),
                       RowState(out.rows),
                       head.buffer(N, D, head.score),
                       device_empty(x, {N}, ScalarType::Int),
                       head.buffer(chunk, D, head.score),
                       head.buffer(head.is_16_bit && need_x ? chunk : 0, D, head.other),
                       scores};
  sweep.prepare(queue, in.ignore_index, data_or_null<double>(in.shift), Factors<T>(in.sample_weight),
                &out.inverse_norm);

  T* sum = data_or_null<T>(out.x_sum);
  const Tensor part = head.buffer(need_x && !at_once && chunk < head.classes ? N : 0, D, head.wide);
  for (int64_t first = 0; first < head.classes; first += chunk) {
    const int64_t width = sweep.width(first);
    if (first > 0) unit_rows(queue, sweep.unit_weights(first, &out.inverse_norm));
    sweep.raise_shift(queue, first, first > 0 ? sum : nullptr);
    if (at_once) {
      if constexpr (std::is_same_v<T, float>) sweep.fold_at_once(queue, first, out.x_sum);
      continue;
    }
    sweep.fold(queue, first, e);
    if (!need_x) continue;
    multiply(x, {e.const_data_ptr(), head.other, N, width, head.padded(width)},
             {(head.is_16_bit ? sweep.w_copy : sweep.w_hat).const_data_ptr(), head.other, width, D, D},
             {(first == 0 ? out.x_sum : part).const_data_ptr(), head.wide, N, D, D});
    if (first > 0)
      launch("accumulate", queue, accumulate_kernel<T>, Grid{(N * D + kThreads - 1) / kThreads}, kThreads, 0,
             static_cast<const T*>(part.const_data_ptr()), N * D, sum);
  }
  if (head.classes == 0 && need_x) torch::stable::zero_(out.x_sum);  // no chunk wrote it
  if (in.need_class_sum)
    sum_classes(queue, head, data_or_null<T>(out.inverse_norm), in.eps, data_or_null<T>(out.class_sum));
  return out;
}

// kappa of every row as these classes alone would have it.
template <class T>
Tensor choose_shift(Queue& queue, const HeadShiftArguments& in) {
  const Head<T> head(in, launch_of(in.kName, queue, in, false));
  const int64_t N = head.batch, D = head.dim;
  const Tensor state = head.buffer(kRowFields, N, ScalarType::Double);
  const Sweep<T> sweep{head,
                       in.eps,
                       head.fixed_shift,
                       RowState(state),
                       head.buffer(N, D, head.score),
                       device_empty(head.x, {N}, ScalarType::Int),
                       head.buffer(head.chunk, D, head.score),
                       head.buffer(0, D, head.other),
                       head.buffer(head.tensor_cores() ? 0 : N, head.padded(head.chunk), head.wide)};
  sweep.prepare(queue, in.ignore_index, nullptr, Factors<T>(std::nullopt), nullptr);
  for (int64_t first = 0; first < head.classes && !head.fixed_shift; first += head.chunk) {
    if (first > 0) unit_rows(queue, sweep.unit_weights(first, nullptr));
    sweep.raise_shift(queue, first, nullptr);
  }
  return torch::stable::clone(torch::stable::select(state, 0, kShift));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> head_sweep(const HeadSweepArguments& in) {
  check_sweep(in);
  Queue queue(in.x);
  const SweepResult out =
      dispatch_accumulator(in.x.scalar_type(), [&]<class T>() { return sweep<T>(queue, in); });
  return {out.rows, out.inverse_norm, out.x_sum, out.class_sum, out.stored};
}

Tensor head_shift(const HeadShiftArguments& in) {
  check_inputs(in.kName, in);
  Queue queue(in.x);
  return dispatch_accumulator(in.x.scalar_type(), [&]<class T>() { return choose_shift<T>(queue, in); });
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  nf::implement<&nf::head_sweep>(m);
  nf::implement<&nf::head_shift>(m);
}
