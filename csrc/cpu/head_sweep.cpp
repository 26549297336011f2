// The sweep on the CPU: prepare the rows, then go over the classes at hand for their sums (head_sweep), or for
// kappa only (head_shift).
#include "cpu/head_launch.h"
#include "cpu/head_stages.h"
#include "cpu/row_cosine.h"
#include "cpu/row_terms.h"
#include "cpu/sinks.h"
#include "cpu/tile_products.h"

namespace nf::cpu {
namespace {

// Which rows count: those that are not ignored and have a weight. The others become zero, so that nothing
// they hold, NaN included, reaches another row or a class.
template <class T>
struct Counting {
  const int64_t* labels;
  int64_t ignore_index;
  const T* sample_weight;  // [N] or null

  double weight(int64_t i) const {
    if (labels[i] == ignore_index) return 0;
    return sample_weight != nullptr ? double(sample_weight[i]) : 1.0;
  }
};

// Unit features and their inverse norms, which have room in double.
template <class T>
void unit_features(const HeadInputs& in, const Counting<T>& counting, T* x_hat, double* inverse) {
  const Rows<T> x(in.x, in.x.size(1));
  for_rows(in.labels.size(0), x.length, [&](int64_t i) {
    inverse[i] = 0;
    T* y = x_hat + i * x.length;
    if (counting.weight(i) == 0) {
      std::fill_n(y, x.length, T(0));
      return;
    }
    const math::RowScale<T> scale = x.kernel.normalize_wide(x.row(i), x.length, 2, T(in.eps), y);
    inverse[i] = scale.wide_inverse();
  });
}

// What a row knows before the sweep: its norm, its weight, and its target's cosine.
template <class T>
void prepare_rows(const HeadInputs& in, const Counting<T>& counting, const ClassWeights<T>& class_weight,
                  T* x_hat, const RowState& rows) {
  const Rows<T> x(in.x, in.x.size(1)), w(in.weight, in.weight.size(1));
  const Labels labels(in.labels);
  const RowCosine<T> cosine_of(x, w, in.eps);
  std::fill_n(rows.data, kRowFields * rows.batch, 0.0);
  unit_features(in, counting, x_hat, rows[kInverseNorm]);
  for_rows(labels.batch, w.length, [&](int64_t i) {
    rows[kRowWeight][i] = counting.weight(i);
    if (rows[kRowWeight][i] == 0) return;
    const bool here = labels.data[i] != kElsewhere;
    rows[kTargetWeight][i] = !class_weight.given ? 1.0 : here ? class_weight[labels.data[i]] : 0.0;
    if (here) rows[kCosine][i] = cosine_of(i, labels.data[i]);
  });
}

// The row's largest logit among the classes other than its label, -inf where there is none.
template <class T>
void largest_logits(const HeadShape& shape, const HeadInputs& in, const RowTerms<T>& terms, T* x_hat,
                    const double* x_inverse, double* result) {
  const int64_t N = shape.batch;
  const Labels labels(in.labels);
  Block scratch;
  TileProducts<T> products(scratch, shape, in.x, in.weight, T(in.eps));
  const Array inverses = scratch.array<T>(shape.slots * shape.chunk),
              cells = scratch.array<T>(shape.slots * N * shape.chunk),
              best_logits = scratch.array<T>(shape.slots * N);
  allocate(scratch);
  products.take_features(x_hat, [&](int64_t i) { return x_inverse[i]; }, [](int64_t) { return 1.0; });
  T *inverse = data_of<T>(inverses), *scores = data_of<T>(cells), *largest = data_of<T>(best_logits);
  std::fill_n(largest, shape.slots * N, -T(INFINITY));
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* tile_scores = scores + slot * N * shape.chunk;
    products.begin(slot, tile, inverse + slot * shape.chunk);
    products.scores(slot, {tile_scores, N, tile.width, tile.width});
    PooledRow<T> pooled(tile);
    for (int64_t i = 0; i < N; ++i) {
      T& best = largest[slot * N + i];
      const T* row = pooled.of(tile_scores + i * tile.width);
      around_target(labels.data[i], tile, [&](int64_t begin, int64_t end) {
        best = std::max(best, terms.largest(row + begin, end - begin, terms.rows[size_t(i)], terms.numbers));
      });
    }
  });
  for (int64_t i = 0; i < N; ++i) {
    T best = largest[i];
    for (int64_t slot = 1; slot < shape.slots; ++slot) best = std::max(best, largest[slot * N + i]);
    result[i] = double(best);
  }
}

// kappa of every row as these classes alone would have it: one constant inside the window of softmax.h,
// else the row's largest logit, which costs a sweep of its own. Without a softmax there is none.
template <class T>
void choose_shift(const HeadShape& shape, const HeadInputs& in, const RowNumbers& scale,
                  const RowTerms<T>& terms, T* x_hat, const double* x_inverse, double* shift) {
  if (terms.largest == nullptr) {
    std::fill_n(shift, shape.batch, 0.0);
    return;
  }
  const auto window = math::fixed_shift_of<T>(double(in.total_classes), in.lowest, in.highest);
  bool all = true;
  for (int64_t i = 0; i < shape.batch; ++i) all = all && window.serves(scale[i]);
  if (!all) largest_logits(shape, in, terms, x_hat, x_inverse, shift);
  for (int64_t i = 0; i < shape.batch; ++i)
    if (window.serves(scale[i])) shift[i] = window.kappa(scale[i]);
}

// What a sweep needs besides: unit rows of the features, products of a tile, its cells, and every thread's sums.
template <class T>
struct SweepScratch {
  Block block;
  Array x_hat;
  TileProducts<T> products;
  Array scores, sums, x_sums, class_sums;

  SweepScratch(const HeadShape& shape, const HeadSweepArguments& in)
      : x_hat(block.array<T>(shape.batch * shape.dim)),
        products(block, shape, in.x, in.weight, T(in.eps)),
        scores(block.array<T>(in.store ? 0 : shape.slots * shape.batch * shape.chunk)),
        sums(block.array<double>(shape.slots * 2 * shape.batch)),
        x_sums(SlotSum<T>::room(block, in.need_x, shape.slots, shape.batch * shape.dim)),
        class_sums(block.array<T>(in.need_class_sum ? shape.slots * (shape.dim + 1) : 0)) {
    allocate(block);
  }
};

// The sums, x_sum, class_sum (U), the stored coefficients, and what the sink collects.
template <class T>
void sweep(const HeadShape& shape, const HeadSweepArguments& in, const RowTerms<T>& terms,
           const ClassWeights<T>& class_weight, SweepScratch<T>& scratch, const RowState& rows,
           const SweepResult& out) {
  const int64_t N = shape.batch, D = shape.dim;
  const Labels labels(in.labels);
  T* class_sum = data_of<T>(out.class_sum);  // U and, last, the sum of the class weights
  T* stored = data_of<T>(out.stored);
  T* inverse_norm = data_of<T>(out.inverse_norm);
  T *scores = data_of<T>(scratch.scores), *class_sums = data_of<T>(scratch.class_sums);
  double* sums = data_of<double>(scratch.sums);
  const SlotSum<T> x_sum(data_of<T>(out.x_sum), scratch.x_sums, shape.slots, N * D);
  std::fill_n(sums, shape.slots * 2 * N, 0.0);
  std::fill_n(class_sums, scratch.class_sums.count(), T(0));
  std::optional<ActiveList<T>> active;
  std::optional<Hardest<T>> hardest;
  if (in.sink == kActiveList) active.emplace(shape, in.capacity);
  if (in.sink == kHardest || in.need_largest) hardest.emplace(shape);
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* e = stored != nullptr ? stored + N * tile.first : scores + slot * N * shape.chunk;
    scratch.products.begin(slot, tile, inverse_norm + tile.first);
    if (class_sum != nullptr) {
      T* sum = class_sums + slot * (D + 1);
      for (int64_t j = 0; j < tile.width; ++j) {
        const T factor = T(class_weight[tile.first + j]);
        accum_rows<T>().axpy(factor, scratch.products.unit_row(slot, j), sum, D);
        sum[D] += factor;
      }
    }
    scratch.products.scores(slot, {e, N, tile.width, tile.width});
    if (hardest) hardest->take(slot, labels, tile, rows, e);
    if (in.sink == kHardest) return;
    double* sum = sums + slot * 2 * N;
    fold_tile(labels, terms, tile, e, [&](int64_t i, const auto& part) {
      sum[i] += part.value;
      sum[N + i] += part.second;
    });
    if (active) active->take(slot, tile, rows, e);
    if (x_sum)
      scratch.products.add_weighted(slot, {e, N, tile.width, tile.width},
                                    terms.largest != nullptr ? sum : nullptr, terms.rows, x_sum.of(slot));
  });
  int64_t* listed = data_of<int64_t>(out.listed);
  T* found = data_of<T>(out.found);
  if (active) active->finish(listed, found);
  if (hardest) hardest->join();
  if (in.need_largest) hardest->put_cosines(rows[kLargestCosine]);
  if (in.sink == kHardest)
    hardest->finish(terms, listed, found, [&](int64_t i, const auto& part) {
      sums[i] = part.value;
      sums[N + i] = part.second;
    });
  add_slots(sums, shape.slots, 2 * N);
  std::copy_n(sums, N, rows[kSum]);
  std::copy_n(sums + N, N, rows[kSecondSum]);
  x_sum.join();
  if (class_sum != nullptr) {
    add_slots(class_sums, shape.slots, D + 1);
    std::copy_n(class_sums, D + 1, class_sum);
  }
}

template <class T>
void run_sweep(const HeadSweepArguments& in, const SweepResult& out) {
  const HeadShape shape = shape_of(in.kName, in, in.store);
  const int64_t N = shape.batch, C = shape.classes;
  if (in.store) data_of<T>(out.stored)[N * C] = T(shape.chunk);
  const RowState rows(out.rows, N);
  const RowNumbers scale(in.scale, in.scale_value);
  const ClassWeights<T> class_weight(in.class_weight);
  SweepScratch<T> scratch(shape, in);
  T* x_hat = data_of<T>(scratch.x_hat);
  const Counting<T> counting{
      Labels(in.labels).data, in.ignore_index,
      in.sample_weight ? static_cast<const T*>(in.sample_weight->const_data_ptr()) : nullptr};
  prepare_rows(in, counting, class_weight, x_hat, rows);
  scratch.products.take_features(
      x_hat, [&](int64_t i) { return rows[kInverseNorm][i]; }, [](int64_t) { return 1.0; });
  RowTerms<T> terms(
      in, scale, [&](int64_t i) { return rows[kRowWeight][i] != 0; }, [](int64_t) { return 0.0; });
  if (in.shift)
    std::copy_n(static_cast<const double*>(in.shift->const_data_ptr()), N, rows[kShift]);
  else
    choose_shift(shape, in, scale, terms, x_hat, rows[kInverseNorm], rows[kShift]);
  for (int64_t i = 0; i < N; ++i) {
    if (rows[kRowWeight][i] == 0) rows[kShift][i] = 0;  // a row that became zero has scores of 0
    terms.rows[size_t(i)].shift = T(rows[kShift][i]);
  }
  sweep(shape, in, terms, class_weight, scratch, rows, out);
}

}  // namespace

void sweep_into(const char* op, const HeadSweepArguments& in, const SweepResult& out) {
  Labels(in.labels).check(op, in.weight.size(0), in.ignore_index, in.is_shard);
  dispatch_accumulator(in.x.scalar_type(), [&]<class T>() { run_sweep<T>(in, out); });
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_sweep(const HeadSweepArguments& in) {
  check_sweep(in.kName, in);
  const int64_t N = in.x.size(0), D = in.x.size(1);
  const ScalarType wide = accumulator(in.x.scalar_type());
  const Tensor rows = fresh({kRowFields, N}, ScalarType::Double),
               inverse_norm = fresh({in.weight.size(0)}, wide),
               x_sum = in.need_x ? fresh({N, D}, wide) : fresh({0}, wide),
               class_sum = fresh({in.need_class_sum ? D + 1 : 0}, wide),
               stored = fresh({in.store ? stored_count(in) : 0}, wide),
               listed = fresh({N, in.capacity}, ScalarType::Long), found = fresh({N, in.capacity}, wide);
  sweep_into(in.kName, in, {rows, inverse_norm, x_sum, class_sum, stored, listed, found});
  return {rows, inverse_norm, x_sum, class_sum, stored, listed, found};
}

Tensor head_shift(const HeadShiftArguments& in) {
  check_inputs(in.kName, in);
  Labels(in.labels).check(in.kName, in.weight.size(0), in.ignore_index, in.is_shard);
  Tensor shift = fresh({in.x.size(0)}, ScalarType::Double);
  const auto run = [&]<class T>(T) {
    const HeadShape shape = shape_of(in.kName, in, false);
    Block scratch;
    const Array features = scratch.array<T>(shape.batch * shape.dim),
                inverse = scratch.array<double>(shape.batch);
    allocate(scratch);
    T* x_hat = data_of<T>(features);
    const Counting<T> counting{Labels(in.labels).data, in.ignore_index, nullptr};
    const RowNumbers scale(in.scale, in.scale_value);
    unit_features(in, counting, x_hat, data_of<double>(inverse));
    const RowTerms<T> terms(
        in, scale, [&](int64_t i) { return counting.weight(i) != 0; }, [](int64_t) { return 0.0; });
    choose_shift(shape, in, scale, terms, x_hat, data_of<double>(inverse),
                 static_cast<double*>(shift.mutable_data_ptr()));
  };
  accumulator(in.x.scalar_type()) == ScalarType::Double ? run(double()) : run(float());
  return shift;
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::cpu::head_sweep>(m);
  nf::implement<&nf::cpu::head_shift>(m);
}
