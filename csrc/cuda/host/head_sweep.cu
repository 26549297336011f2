// The sweep of the engine over the classes on CUDA, in chunks: products by cuBLAS or, for 16-bit operands
// where device and shape allow it, by the kernels for tensor cores (row_state.h: Makers), everything
// else in forward_kernels.cuh, fold_scores.cu and sinks.cu. See math/terms and math/softmax.h for the formulas
// and row_state.h for what is kept per row.
#include "cuda/device/add_runs.cuh"
#include "cuda/device/forward_kernels.cuh"
#include "cuda/host/add_product.cuh"
#include "cuda/host/head_stages.h"
#include "cuda/host/sinks.h"
#include "cuda/products/sm90_single_sweep.h"

namespace nf {
namespace {

// The memory of a run over the classes.
struct SweepScratch {
  Block block;
  Array scores;             // [N, stride of a chunk], or empty where they are never written
  Array x_hat;              // [N, D], operand type
  Array w_hat;              // [chunk, D]
  Array w_copy;             // the same, as what meets E, or empty
  Array arrivals;           // [N], counters of last_to_arrive
  Array neutral_threshold;  // [N], 0 in the rows that do not count, or empty
  // What more a sweep for sums or for the hardest has of:
  Array e;                // [N, stride of a chunk]
  Array partial;          // [2 or 3, splits, N], of the sums
  Array x_partial;        // [splits, N, D], of the single sweep
  Array x_part;           // part_cells of x_sum
  Array placed, counts;   // of the active list (sinks.h)
  Array cosines, places;  // of the hardest
  Array class_partial;    // [runs, D + 1], of the class sum

  template <class T>
  SweepScratch(const Head<T>& head, bool need_copy)
      : x_hat(block.array(head.batch * head.dim, head.score)),
        w_hat(block.array(head.chunk * head.dim, head.score)),
        w_copy(block.array(need_copy && head.is_16_bit ? head.chunk * head.dim : 0, head.other)),
        arrivals(block.array<int>(head.batch)),
        neutral_threshold(block.array<double>(head.in.threshold ? head.batch : 0)) {}
};

// One run over the classes: what the chunks share.
template <class T>
struct Sweep : SweepScratch {
  const Head<T>& head;
  bool final_shift;  // kappa stays as prepare() sets it: one constant, or that of all shards
  bool largest;      // the largest cosines are wanted beside the sums
  RowState rows;
  TermRows terms;

  // `claim` names what more of the scratch is wanted.
  template <class Claim>
  Sweep(const Head<T>& of, const RowState& state, bool shift_is_given, bool need_copy, bool need_largest,
        const Claim& claim)
      : SweepScratch(of, need_copy),
        head(of),
        final_shift(head.fixed_shift || shift_is_given),
        largest(need_largest),
        rows(state),
        terms((claim(static_cast<SweepScratch&>(*this)), allocate(block, head.in.x),
               head.term_rows(rows.of(kShift), data_of<const double>(neutral_threshold)))) {}

  // Everything before the first product: the rows, and the unit rows of the first chunk.
  void prepare(Queue& queue, int64_t ignore_index, const double* shift, const Factors<T>& sample_weight,
               const Array* inverse_norm) const {
    const HeadInputs& in = head.in;
    const PrepareRows<T> task{StoredArray(in.x),
                              StoredArray(in.weight),
                              terms.labels,
                              head.dim,
                              head.classes,
                              in.is_shard,
                              ignore_index,
                              in.eps,
                              terms.scale,
                              head.window,
                              shift,
                              data_or_null<double>(in.threshold),
                              sample_weight,
                              Factors<T>(in.class_weight),
                              largest,
                              rows,
                              StoredArray(x_hat),
                              data_of<double>(neutral_threshold),
                              data_of<unsigned>(arrivals)};
    const UnitRows classes = unit_weights(head.at(0), inverse_norm);
    const int64_t row_blocks = warp_per_row(head.batch).x;
    dispatch_stored(in.weight.scalar_type(), [&]<class S>() {
      if constexpr (std::is_same_v<accum_t<S>, T>)
        dispatch_rows<kVectorOf<S>>(rows_are_aligned<S>(classes), classes.length, [&]<class Shape>() {
          launch("prepare", queue, prepare_kernel<T, S, Shape>,
                 Grid{row_blocks + warp_per_rows(classes.rows, Shape::kRows).x}, kThreads, 0, task, classes,
                 row_blocks);
        });
    });
  }

  UnitRows unit_weights(const Chunk& of, const Array* inverse_norm) const {
    return head.unit_weights(of, w_hat, w_copy, inverse_norm);
  }

  // Makes the scores, where they are written at all, and raises kappa to the largest of them outside
  // the window of math/softmax.h; x_sum, if given, is rescaled with it.
  void raise_shift(Queue& queue, const Chunk& of, T* x_sum) const {
    if (head.plain_products()) return;
    if (!head.tensor_cores()) {
      head.make_scores(of, x_hat, w_hat, scores);
      update_shift(queue,
                   {data_of<const T>(scores), of.width, of.stride(), 1, true, of.first, head.in.centers},
                   x_sum);
      return;
    }
    if constexpr (std::is_same_v<T, float>) {
      if (final_shift) return;
      const int64_t splits = head.splits(queue, of);
      const Tensor largest = head.buffer(splits, head.batch, ScalarType::Float);
      const auto find = [&]<class Task>(void (*run)(Queue&, const Task&)) {
        Task task = head.template score_task<Task>(of, x_hat, w_hat, terms, {rows, nullptr, nullptr});
        task.largest = data_of<float>(largest);
        run(queue, task);
      };
      if (head.tf32())
        find(tf32_score_largest);
      else
        find(head.makers.scores == Maker::kSm90 ? sm90_score_largest : score_largest);
      update_shift(queue, {data_of<float>(largest), splits, 1, head.batch, false, 0, 1}, x_sum);
    }
  }

  // E into `e` (or nowhere); its sums into rows.
  void fold(Queue& queue, const Chunk& of, const Array& e) const {
    head.coefficients(queue, of, x_hat, w_hat, scores, terms, sums(), e);
  }

  // The sums and x_sum in one kernel, without E.
  void fold_at_once(Queue& queue, const Chunk& of, const Array& x_sum) const {
    const auto run = head.makers.scores == Maker::kSm90 ? sm90_single_sweep : single_sweep;
    run(queue, {data_of<const Half>(x_hat), data_of<const Half>(w_hat), data_of<const BFloat16>(w_copy),
                head.batch, head.dim, of.width, of.first, terms, sums(), data_of<float>(x_partial),
                data_of<float>(x_sum), of.first > 0});
  }

  SinkChunk sink_chunk(const Chunk& of) const { return {of.first, of.width, of.stride(), head.classes}; }

 private:
  SweepSums sums() const { return {rows, data_of<double>(partial), data_of<unsigned>(arrivals), largest}; }

  void update_shift(Queue& queue, const RowLogits<T>& logits, T* x_sum) const {
    if (final_shift) return;
    const int64_t splits = row_splits(queue, head.batch, logits.count);
    const Tensor largest_logits = head.buffer(splits > 1 ? splits : 0, head.batch, head.wide);
    dispatch_term<T>(terms.term, [&]<class Term>() {
      if constexpr (Term::kSoftmax)
        launch("update_shift", queue, update_shift_kernel<T, Term>, Grid{head.batch, splits}, kThreads,
               shared_bytes<T>(kThreads / kWarp), logits, terms, head.window, rows,
               data_of<T>(largest_logits), data_of<unsigned>(arrivals), x_sum, head.dim);
    });
  }
};

// Blocks of class_sum_kernel along the classes.
int64_t class_runs(const Queue& queue, int64_t classes) {
  return std::min<int64_t>(classes, 8 * queue.multiprocessors());
}

// class_sum = sum of class_weight_j w_hat_j and, last, of class_weight_j.
template <class T>
void sum_classes(Queue& queue, const Head<T>& head, const T* inverse_norm, double* partials, T* class_sum) {
  const HeadInputs& in = head.in;
  const int64_t D = head.dim, runs = class_runs(queue, head.classes);
  const Grid columns = thread_per(D + 1);
  launch("class_sum", queue, class_sum_kernel<T>, Grid{runs, columns.x}, kThreads, 0, StoredArray(in.weight),
         inverse_norm, head.classes, D, T(in.eps), Factors<T>(in.class_weight), partials);
  add_runs(queue, partials, runs, D + 1, class_sum);
}

// Of every row the one class of the largest cosine: nothing of the others is asked.
template <class T>
void sweep_for_hardest(Queue& queue, const Sweep<T>& sweep, const SweepResult& out) {
  const Head<T>& head = sweep.head;
  const int64_t splits = row_splits(queue, head.batch, head.chunk);
  const auto find = [&](const Chunk& of) {
    find_hardest<T>(queue,
                    {sweep.sink_chunk(of), splits, data_of<const T>(sweep.scores), sweep.terms, sweep.rows,
                     sweep.largest, data_of<T>(sweep.cosines), data_of<int64_t>(sweep.places),
                     data_of<unsigned>(sweep.arrivals), data_of<int64_t>(out.listed), data_of<T>(out.found)});
  };
  for (int64_t first = 0; first < head.classes; first += head.chunk) {
    const Chunk of = head.at(first);
    if (first > 0) unit_rows(queue, sweep.unit_weights(of, &out.inverse_norm));
    sweep.raise_shift(queue, of, nullptr);
    find(of);
  }
  if (head.classes == 0) find({0, 0});
}

// All sums, E, x_sum and the active list.
template <class T>
void sweep_for_sums(Queue& queue, const Sweep<T>& sweep, const HeadSweepArguments& in, const Array& e,
                    const SweepResult& out) {
  const Head<T>& head = sweep.head;
  const int64_t N = head.batch, D = head.dim;
  const bool at_once = head.single_sweep() && in.need_x;
  const bool list = in.sink == kActiveList;
  const int64_t splits = row_splits(queue, N, head.chunk);
  int64_t* before = data_of<int64_t>(sweep.placed);
  int64_t* after = list ? before + N : nullptr;
  const auto put_on_list = [&](const Chunk& of) {
    list_active<T>(queue, {sweep.sink_chunk(of), splits, data_of<const void>(e), head.is_16_bit, sweep.rows,
                           in.capacity, data_of<int>(sweep.counts), before, after,
                           data_of<int64_t>(out.listed), data_of<T>(out.found)});
    std::swap(before, after);
  };
  T* sum = data_of<T>(out.x_sum);
  for (int64_t first = 0; first < head.classes; first += head.chunk) {
    const Chunk of = head.at(first);
    if (first > 0) unit_rows(queue, sweep.unit_weights(of, &out.inverse_norm));
    sweep.raise_shift(queue, of, first > 0 ? sum : nullptr);
    if (at_once) {
      if constexpr (std::is_same_v<T, float>) sweep.fold_at_once(queue, of, out.x_sum);
      continue;
    }
    sweep.fold(queue, of, e);
    if (list) put_on_list(of);
    if (in.need_x)
      add_product<T>(queue, head, of, e, head.is_16_bit ? sweep.w_copy : sweep.w_hat, out.x_sum,
                     sweep.x_part);
  }
  if (head.classes > 0) return;
  if (in.need_x && out.x_sum.count() > 0) {
    Tensor zeros = view_of(out.x_sum, {N, D}, Place(in.x));
    torch::stable::zero_(zeros);  // no chunk wrote it
  }
  if (list) put_on_list({0, 0});
}

template <class T>
void run_sweep(Queue& queue, const HeadSweepArguments& in, const SweepResult& out) {
  // The single sweep knows neither a sink nor the largest cosines; all other products leave E.
  const Held held = in.sink == kHardest                         ? Held::kScores
                    : in.sink == kActiveList || in.need_largest ? Held::kE
                                                                : Held::kNothing;
  Head<T> head(in, launch_of(in.kName, queue, in, in.store, held));
  if (in.store) head.chunk = std::max<int64_t>(1, head.classes);
  const int64_t N = head.batch, D = head.dim;
  const int64_t cells = N * head.largest_chunk().stride();
  // In the wide types E replaces the scores, where they are written: stored E is there.
  const bool in_place = !head.is_16_bit && !head.tensor_cores(), at_once = head.single_sweep() && in.need_x;
  const bool need_e = (in.need_x && !head.single_sweep()) || in.sink == kActiveList;
  const auto claim = [&](SweepScratch& of) {
    Block& block = of.block;
    of.scores = in.store && in_place ? out.stored : block.array(head.tensor_cores() ? 0 : cells, head.wide);
    of.e = in.store                                        ? out.stored
           : in_place && (need_e || head.plain_products()) ? of.scores
                                                           : block.array(need_e ? cells : 0, head.other);
    if (in.need_class_sum) of.class_partial = block.array<double>(class_runs(queue, head.classes) * (D + 1));
    const int64_t splits = row_splits(queue, N, head.chunk);
    if (in.sink == kHardest) {
      of.cosines = block.array(splits > 1 ? splits * N : 0, head.wide);
      of.places = block.array<int64_t>(splits > 1 ? splits * N : 0);
      return;
    }
    if (in.sink == kActiveList) {
      of.placed = block.array<int64_t>(2 * N);
      of.counts = block.array<int>(splits > 1 ? splits * N : 0);
    }
    const int64_t parts = head.most_of_chunks([&](const Chunk& chunk) {
      if (!at_once) return head.splits(queue, chunk);
      return (head.makers.scores == Maker::kSm90 ? sm90_sweep_splits : sweep_splits)(queue, N, D,
                                                                                     chunk.width);
    });
    of.partial = block.array<double>((in.need_largest ? 3 : 2) * parts * N);
    of.x_partial = block.array<float>(at_once ? parts * N * D : 0);
    of.x_part = block.array(in.need_x && !at_once ? head.part_cells(queue) : 0, head.wide);
  };
  const Sweep<T> sweep(head, RowState(out.rows, N), in.shift.has_value(), in.need_x, in.need_largest, claim);
  sweep.prepare(queue, in.ignore_index, data_or_null<double>(in.shift), Factors<T>(in.sample_weight),
                &out.inverse_norm);
  if (in.sink == kHardest)
    sweep_for_hardest(queue, sweep, out);
  else
    sweep_for_sums(queue, sweep, in, sweep.e, out);
  if (in.need_class_sum)
    sum_classes(queue, head, data_of<const T>(out.inverse_norm), data_of<double>(sweep.class_partial),
                data_of<T>(out.class_sum));
}

// kappa of every row as these classes alone would have it.
template <class T>
Tensor choose_shift(Queue& queue, const HeadShiftArguments& in) {
  const Head<T> head(in, launch_of(in.kName, queue, in, false, Held::kNothing));
  const Tensor state = head.buffer(kRowFields, head.batch, ScalarType::Double);
  const int64_t cells = head.batch * head.largest_chunk().stride();
  const Sweep<T> sweep(head, RowState(state), false, false, false, [&](SweepScratch& of) {
    of.scores = of.block.array(head.tensor_cores() ? 0 : cells, head.wide);
  });
  sweep.prepare(queue, in.ignore_index, nullptr, Factors<T>(std::nullopt), nullptr);
  for (int64_t first = 0; first < head.classes && !head.fixed_shift; first += head.chunk) {
    if (first > 0) unit_rows(queue, sweep.unit_weights(head.at(first), nullptr));
    sweep.raise_shift(queue, head.at(first), nullptr);
  }
  return torch::stable::clone(torch::stable::select(state, 0, kShift));
}

}  // namespace

void sweep_into(Queue& queue, const HeadSweepArguments& in, const SweepResult& out) {
  dispatch_accumulator(in.x.scalar_type(), [&]<class T>() { run_sweep<T>(queue, in, out); });
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_sweep(const HeadSweepArguments& in) {
  check_sweep(in.kName, in);
  Queue queue(in.x);
  const Tensor& x = in.x;
  const int64_t N = x.size(0), D = x.size(1);
  const ScalarType wide = accumulator(x.scalar_type());
  const StoredCells cells = stored_cells(in);
  const Tensor rows = device_empty(x, {kRowFields, N}, ScalarType::Double),
               inverse_norm = device_empty(x, {in.weight.size(0)}, wide),
               x_sum = in.need_x ? device_empty(x, {N, D}, wide) : device_empty(x, {0}, wide),
               class_sum = device_empty(x, {in.need_class_sum ? D + 1 : 0}, wide),
               stored = device_empty(x, {in.store ? cells.count : 0}, cells.type),
               listed = device_empty(x, {N, in.capacity}, ScalarType::Long),
               found = device_empty(x, {N, in.capacity}, wide);
  sweep_into(queue, in, {rows, inverse_norm, x_sum, class_sum, stored, listed, found});
  return {rows, inverse_norm, x_sum, class_sum, stored, listed, found};
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
