// The kernels of the sweep over the classes other than its products: per row, and per element of a chunk
// of scores.
#pragma once

#include <device/arrival.cuh>

#include "cuda/device/row_cosine.cuh"
#include "cuda/device/row_splits.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/host/head.cuh"
#include "math/centers.h"

namespace nf {
namespace {

// Everything a row knows before the sweep: its norm, its weight, the shift, and, where its target is among
// the classes at hand, the target's cosine (products and sums in double, from the raw rows). A row that is
// ignored, or has no weight, becomes zero, and so do its scores, its shift and its threshold: nothing it holds,
// NaN included, reaches another row or a class. One warp per row.
template <class T>
struct PrepareRows {
  StoredArray x, w;       // [N, D], [C, D]
  const int64_t* labels;  // [N]
  int64_t dim, classes;
  bool is_shard;
  int64_t ignore_index;
  double eps;
  RowNumbers scale;
  math::FixedShift window;
  const double* given_shift;      // [N] or null
  const double* given_threshold;  // [N] or null
  Factors<T> sample_weight, class_weight;
  bool largest;  // will be filled
  RowState rows;
  StoredArray x_hat;   // [N, D], operand type
  double* threshold;   // [N], with given_threshold
  unsigned* arrivals;  // [N]: counters of last_to_arrive, set to 0
};

template <class T>
NF_DEVICE void prepare_row(const PrepareRows<T>& task, int64_t i) {
  const StoredArray &x = task.x, &x_hat = task.x_hat;
  const RowState& rows = task.rows;
  const int64_t dim = task.dim, classes = task.classes, ignore_index = task.ignore_index;
  const int64_t label = task.labels[i];
  const bool ignored = label == ignore_index || task.sample_weight[i] == 0.0;
  const bool given = label != ignore_index && !(task.is_shard && label == kElsewhere);
  const bool here = given && !ignored;
  NF_DEVICE_CHECK(!given || (label >= 0 && label < classes),
                  "head_sweep: expected `labels` in [0, %lld) or ignore_index (%lld), got %lld at row %lld",
                  (long long)classes, (long long)ignore_index, (long long)label, (long long)i);
  RowCosine row{};
  if (!ignored) row = row_cosine(x, i, task.w, here ? label : -1, dim, task.eps);
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    x_hat.store<T>(i * dim + d, ignored ? T(0) : T(x.load<double>(i * dim + d) * row.x.outer * row.x.inner));
  if (lane_id() != 0) return;
  task.arrivals[i] = 0;
  for (int field = 0; field < kRowFields; ++field) rows.at(RowField(field), i) = 0;
  if (task.largest) rows.at(kLargestCosine, i) = -INFINITY;  // of no class so far
  const double scale = task.scale.at(i);
  rows.at(kShift, i) = ignored                       ? 0.0
                       : task.given_shift != nullptr ? task.given_shift[i]
                       : task.window.serves(scale)   ? task.window.kappa(scale)
                                                     : -INFINITY;
  if (task.given_threshold != nullptr) task.threshold[i] = ignored ? 0.0 : task.given_threshold[i];
  if (ignored) return;
  rows.at(kInverseNorm, i) = row.x.inverse();
  rows.at(kCosine, i) = row.cosine;
  rows.at(kRowWeight, i) = task.sample_weight[i];
  rows.at(kTargetWeight, i) = !task.class_weight.given ? 1.0 : here ? task.class_weight[label] : 0.0;
}

// The rows, one warp each, and the unit rows of the first classes, of type S.
template <class T, class S, class Shape>
NF_KERNEL_RESIDENT(kThreads, (kResidentOf<Shape, kThreads, 1>))
prepare_kernel(PrepareRows<T> rows, UnitRows classes, int64_t row_blocks) {
  if (block_id() < row_blocks) {
    const int64_t i = block_id() * kRowsPerBlock + warp_id();
    if (i < rows.rows.batch) prepare_row(rows, i);
  } else {
    const int64_t warp = (block_id() - row_blocks) * kRowsPerBlock + warp_id();
    const WarpPlace<Shape> place(warp * Shape::kRows, classes.rows);
    if (place.has(0)) unit_rows_of_warp<S>(classes, place, accum_t<S>(1));
  }
}

// Where a row's logits can be read: `count` of them, at data[i * row_stride + k * step]. Those of classes are
// cosines, of which the term makes logits; the others are the largest logits of some classes.
template <class T>
struct RowLogits {
  const T* data;
  int64_t count;
  int64_t row_stride;
  int64_t step;
  bool of_classes;  // k is the class first + k
  int64_t first;
  int64_t centers;  // of a class: neighbours, of which the nearest counts; `count` is a multiple
};

// Outside the window of math/softmax.h: kappa becomes the largest logit seen so far, and what was
// added up under the old one is rescaled. Inside it a block returns at once. Blocks: rows x splits of the logits, of
// which the last to come has the largest of all.
template <class T, class Term>
NF_KERNEL(kThreads)
update_shift_kernel(RowLogits<T> logits, TermRows terms, math::FixedShift window, RowState rows,
                    T* __restrict__ largest,          // [splits, N], or null where there is one
                    unsigned* __restrict__ arrivals,  // [N], all 0
                    T* __restrict__ x_sum,            // [N, D] or null
                    int64_t dim) {
  const int64_t i = block_id(), split = block_y(), splits = block_count_y();
  const double s = terms.scale.at(i);
  if (window.serves(s)) return;
  SharedMemory shared;
  T* scratch = shared.take<T>(kThreads / kWarp);
  const int64_t target = logits.of_classes ? target_place(terms.labels[i], logits.first, logits.count) : -1;
  const Term term(terms.at<T>(i), terms.numbers);
  T best = -T(INFINITY);
  const int64_t centers = logits.centers;
  const RowSplit mine = row_split(logits.count, centers);
  for (int64_t k = mine.begin + thread_id() * centers; k < mine.end; k += kThreads * centers) {
    const T* of_class = logits.data + i * logits.row_stride + k * logits.step;
    const T value =
        math::winner<T>(centers, [&](int64_t center) { return of_class[center * logits.step]; }).cosine;
    const T z = logits.of_classes ? T(s) * term.logit(value) : value;
    best = !(target >= k && target < k + centers) && z > best ? z : best;
  }
  best = block_largest(best, scratch);
  if (splits > 1) {
    if (thread_id() == 0) largest[split * rows.batch + i] = best;
    if (!last_to_arrive(arrivals + i, unsigned(splits))) return;
    best = -T(INFINITY);
    for (int64_t k = thread_id(); k < splits; k += kThreads) {
      const T other = largest[k * rows.batch + i];
      best = other > best ? other : best;
    }
    best = block_largest(best, scratch);
  }
  const double old = rows.at(kShift, i);
  const double shift = double(best) > old ? double(best) : old;
  const double factor = shift > old ? std::exp(old - shift) : 1.0;
  sync_block();  // every thread's read of the old shift, before it changes
  if (thread_id() == 0) {
    rows.at(kShift, i) = shift;
    rows.at(kSum, i) *= factor;
    rows.at(kSecondSum, i) *= factor;
  }
  if (x_sum != nullptr && factor != 1.0)
    for (int64_t d = thread_id(); d < dim; d += kThreads) x_sum[i * dim + d] *= T(factor);
}

// partial[b][d] = sum of class_weight_j w_hat_jd over the b-th run of classes, and for d = D of
// class_weight_j. Blocks: runs x columns.
template <class T>
NF_KERNEL(kThreads)
class_sum_kernel(StoredArray w,                       // [C, D]
                 const T* __restrict__ inverse_norm,  // [C]
                 int64_t classes, int64_t dim, T eps, Factors<T> class_weight,
                 double* __restrict__ partial)  // [runs, D + 1]
{
  const int64_t d = block_y() * kThreads + thread_id();
  const int64_t first = block_id() * classes / block_count(),
                last = (block_id() + 1) * classes / block_count();
  double sum = 0;
  for (int64_t j = first; j < last; ++j) {
    // All lanes, those behind the row's end too: the warp may have to sum the row.
    const math::RowScale<T> scale = scale_again(w, j, dim, eps, inverse_norm[j]);
    const double unit =
        d < dim ? w.load<double>(j * dim + d) * double(scale.outer) * double(scale.inner) : 1.0;
    sum += class_weight[j] * unit;
  }
  if (d <= dim) partial[block_id() * (dim + 1) + d] = sum;
}

}  // namespace
}  // namespace nf
