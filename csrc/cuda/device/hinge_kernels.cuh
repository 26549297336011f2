// The kernels of agent_hinge.cu: rows of cosines folded into the rows' state, and turned into gradients.
#pragma once

#include "cuda/device/agent_rows.cuh"
#include "cuda/device/row_cosine.cuh"
#include "cuda/device/row_state.cuh"
#include "engine/hinge_state.h"
#include "math/terms/hinge.h"

namespace nf {
namespace {

constexpr int kThreads = kRowThreads;
constexpr int kWarps = kThreads / kWarp;

// rows[field][i] in device memory
struct HingeRows {
  double* data;
  int64_t batch;

  explicit HingeRows(const Tensor& rows)
      : data(static_cast<double*>(const_cast<void*>(rows.const_data_ptr()))), batch(rows.size(1)) {}
  NF_DEVICE double& at(HingeField field, int64_t i) const { return data[field * batch + i]; }
  NF_DEVICE bool ignored(int64_t i) const { return at(kHingeCounts, i) == 0.0; }
};

// classes[i][k] and slopes[i][k], k < listed; slopes perhaps null
template <class T>
struct ActiveList {
  int64_t* classes;
  T* slopes;
  int64_t listed;

  NF_DEVICE void set(int64_t i, int64_t k, int64_t entry, T slope) const {
    classes[i * listed + k] = entry;
    if (slopes != nullptr) slopes[i * listed + k] = slope;
  }
};

// Norm (summed in double, from the raw row), distance to the label's agent, threshold; an empty list. An
// ignored row becomes zero, so that nothing it holds, NaN included, reaches a class. One warp per row.
template <class T>
NF_KERNEL(kThreads)
prepare_hinge_kernel(StoredArray x,                             // [N, D]
                     const int64_t* __restrict__ labels,        // [N]
                     const double* __restrict__ target_cosine,  // [N]
                     int64_t dim, int64_t classes, int64_t ignore_index, double eps, Scale margin,
                     bool triplet, HingeRows rows, StoredArray x_hat, ActiveList<T> list,
                     T* __restrict__ target)  // [N]
{
  const int64_t i = block_id() * kWarps + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  const int64_t label = labels[i];
  const bool ignored = label == ignore_index, here = !ignored && label >= 0 && label < classes;
  math::RowScale<double> scale{};
  if (!ignored) scale = row_cosine(x, i, x, -1, dim, eps).x;
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    x_hat.store<T>(i * dim + d, ignored ? T(0) : T(x.load<double>(i * dim + d) * scale.outer * scale.inner));
  for (int64_t k = lane_id(); k < list.listed; k += kWarp)
    list.set(i, k, k == 0 && here ? label : classes, T(0));
  if (lane_id() != 0) return;
  const double distance = ignored ? 0.0 : math::distance_of_cosine(target_cosine[i]);
  target[i] = T(distance);
  for (int field = 0; field < kHingeFields; ++field) rows.at(HingeField(field), i) = 0;
  rows.at(kHingeInverseNorm, i) = ignored ? 0.0 : scale.inverse();
  rows.at(kHingeThreshold, i) = ignored ? 0.0 : margin.value() + (triplet ? distance : 0.0);
  rows.at(kHingeBest, i) = -INFINITY;
  rows.at(kHingeBestClass, i) = -1;
  rows.at(kHingeCounts, i) = ignored ? 0.0 : 1.0;
}

NF_DEVICE int count_bits(unsigned bits) {
  int count = 0;
  for (; bits != 0; bits &= bits - 1) ++count;
  return count;
}

// A chunk of cosines into the rows' sums and lists. One block per row.
template <class T>
NF_KERNEL(kThreads)
fold_kernel(const T* __restrict__ scores,  // [N, width]
            int64_t width, int64_t first,
            const int64_t* __restrict__ labels,  // [N]
            bool hardest, bool exponential, HingeRows rows, ActiveList<T> list) {
  SharedMemory shared;
  double* scratch = shared.take<double>(kWarps);
  int* counts = shared.take<int>(kWarps);
  const int64_t i = block_id();
  if (rows.ignored(i)) return;  // the whole block leaves
  const int64_t target = target_place(labels[i], first, width), capacity = hardest ? 0 : list.listed - 1;
  const T threshold = T(rows.at(kHingeThreshold, i));
  const double before = rows.at(kHingeActive, i);
  int64_t listed = before < double(capacity) ? int64_t(before) : capacity;
  double sum = 0, value = 0, slope = 0, cosine = 0, active = 0;
  T best = -T(INFINITY);
  int64_t best_class = -1;
  for (int64_t base = 0; base < width; base += kThreads) {
    const int64_t j = base + thread_id();
    const bool valid = j < width && j != target;
    const T c = valid ? scores[i * width + j] : T(0);
    const T excess = math::hinge_excess(threshold, c);
    const bool on = valid && math::hinge_active(excess);
    T step = 0;
    if (valid) {
      cosine += double(c);
      if (c > best) best = c, best_class = first + j;
    }
    if (on) {
      const auto h = math::hinge_term<T>(exponential, threshold, c);
      step = h.slope;
      sum += double(excess);
      value += double(h.value);
      slope += double(h.slope);
      active += 1;
    }
    if (listed >= capacity) continue;  // the same for the whole block
    const unsigned mask = warp_ballot(on);
    if (lane_id() == 0) counts[warp_id()] = count_bits(mask);
    sync_block();  // the counts above, before the reads below
    int64_t at = listed;
    for (int k = 0; k < kWarps; ++k) {
      if (k < warp_id()) at += counts[k];
      listed += counts[k];
    }
    at += count_bits(mask & ((1u << lane_id()) - 1u));
    if (on && at < capacity) list.set(i, 1 + at, first + j, step);
    sync_block();  // the reads of the counts, before the next round's writes
  }
  sum = block_sum(sum, scratch), value = block_sum(value, scratch), slope = block_sum(slope, scratch);
  cosine = block_sum(cosine, scratch), active = block_sum(active, scratch);
  const double top = block_largest(double(best), scratch);
  // Of equal cosines the first class.
  const double chosen = -block_largest(double(best) == top ? -double(best_class) : -INFINITY, scratch);
  if (thread_id() != 0) return;
  rows.at(kExcessSum, i) += sum;
  rows.at(kLossValue, i) += value;
  rows.at(kHingeSlope, i) += slope;
  rows.at(kHingeActive, i) += active;
  rows.at(kHingeCosine, i) += cosine;
  if (top > rows.at(kHingeBest, i)) {
    rows.at(kHingeBest, i) = top;
    rows.at(kHingeBestClass, i) = chosen;
  }
}

// What the loss takes of a row; the hardest class into its list. One thread per row.
template <class T>
NF_KERNEL(kThreads)
finish_hinge_kernel(bool hardest, bool exponential, HingeRows rows, ActiveList<T> list,
                    T* __restrict__ value)  // [N]
{
  const int64_t i = block_id() * kThreads + thread_id();
  if (i >= rows.batch) return;
  if (hardest && !rows.ignored(i)) {
    const int64_t best_class = int64_t(rows.at(kHingeBestClass, i));
    auto h = math::hinge_term<T>(exponential, T(rows.at(kHingeThreshold, i)), T(rows.at(kHingeBest, i)));
    if (best_class < 0) h = {T(0), T(0)};
    const double sum = rows.at(kExcessSum, i);
    rows.at(kLossValue, i) = sum != sum ? sum : double(h.value);  // NaN among the cosines shows
    rows.at(kHingeSlope, i) = double(h.slope);
    if (h.slope != T(0) && list.listed > 1) list.set(i, 1, best_class, h.slope);
  }
  value[i] = T(rows.at(kLossValue, i));
}

// Cosines -> d loss / d cosine, in place. Blocks: rows x splits of a row.
template <class T>
NF_KERNEL(kThreads)
hinge_gradients_kernel(T* __restrict__ scores,  // [N, width]
                       int64_t width, int64_t first,
                       const int64_t* __restrict__ labels,                                       // [N]
                       const T* __restrict__ target_factor, const T* __restrict__ hinge_factor,  // [N]
                       bool exponential, HingeRows rows) {
  const int64_t i = block_id();
  const bool ignored = rows.ignored(i);
  const int64_t target = target_place(labels[i], first, width);
  const T threshold = T(rows.at(kHingeThreshold, i));
  for (int64_t j = block_y() * kThreads + thread_id(); j < width; j += block_count_y() * kThreads) {
    T& cell = scores[i * width + j];
    cell = ignored       ? T(0)
           : j == target ? target_factor[i]
                         : hinge_factor[i] * math::hinge_term<T>(exponential, threshold, cell).slope;
  }
}

// Unit features from the saved norms; zero where a row is ignored. One warp per row.
template <class T>
NF_KERNEL(kThreads)
unit_features_kernel(StoredArray x, int64_t dim, double eps, HingeRows rows, T* __restrict__ x_hat) {
  const int64_t i = block_id() * kWarps + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  const bool ignored = rows.ignored(i);
  math::RowScale<double> scale{};
  if (!ignored) scale = feature_scale_again<T>(x, i, dim, eps, rows.at(kHingeInverseNorm, i));
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    x_hat[i * dim + d] = ignored ? T(0) : T(x.load<double>(i * dim + d) * scale.outer * scale.inner);
}

// sum[i] += part[i]
template <class T>
NF_KERNEL(kThreads)
add_kernel(const T* __restrict__ part, int64_t count, T* __restrict__ sum) {
  const int64_t i = block_id() * kThreads + thread_id();
  if (i < count) sum[i] += part[i];
}

// dx = P_x(sum). One warp per row.
template <class T>
NF_KERNEL(kThreads)
finish_features_kernel(StoredArray x, int64_t dim, double eps, HingeRows rows, const T* __restrict__ sum,
                       StoredArray dx) {
  const int64_t i = block_id() * kWarps + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  if (rows.ignored(i)) {        // whatever it holds, NaN included, has no gradient
    for (int64_t d = lane_id(); d < dim; d += kWarp) dx.store<T>(i * dim + d, T(0));
    return;
  }
  project_row<T>(
      x, i, dim, eps, scale_again(x, i, dim, T(eps), T(rows.at(kHingeInverseNorm, i))),
      [&](int64_t d) { return sum[i * dim + d]; }, dx);
}

}  // namespace
}  // namespace nf
