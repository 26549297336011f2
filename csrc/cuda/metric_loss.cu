// The hinge losses over agents on CUDA (csrc/cpu/metric_loss.cpp has the plan, csrc/math/hinge.h the
// formulas): cosines by cuBLAS in the accumulator type, one chunk of classes at a time; every row is
// folded by one block, which lists what is active in the order of the classes. No atomics: runs repeat
// bit by bit. The margin may be a tensor and is read on the device; nothing is read back.
#include <optional>

#include "gemm.h"
#include "hinge_state.h"
#include "math/hinge.h"
#include "math/normalize.h"
#include "reduce.cuh"
#include "rows.h"
#include "stored.cuh"

namespace nf {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

Grid warp_per_row(int64_t rows) { return {(rows + kWarps - 1) / kWarps}; }
Grid thread_per(int64_t count) { return {(count + kThreads - 1) / kThreads}; }

// rows[field][i] in device memory
struct HingeRows {
  double* data;
  int64_t batch;

  explicit HingeRows(const Tensor& rows)
      : data(static_cast<double*>(const_cast<void*>(rows.const_data_ptr()))), batch(rows.size(1)) {}
  NF_DEVICE double& at(HingeField field, int64_t i) const { return data[field * batch + i]; }
  NF_DEVICE bool ignored(int64_t i) const { return at(kHingeInverseNorm, i) == 0.0; }
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

// Norm, distance to the label's agent (products and sums in double, from the raw rows), threshold; an
// empty list. An ignored row becomes zero, so that nothing it holds, NaN included, reaches a class. One
// warp per row.
template <class T>
NF_KERNEL(kThreads)
prepare_hinge_kernel(StoredArray x, StoredArray w,        // [N, D], [C, D]
                     const int64_t* __restrict__ labels,  // [N]
                     int64_t dim, int64_t classes, int64_t ignore_index, double eps, Scale margin,
                     bool triplet, HingeRows rows, StoredArray x_hat, ActiveList<T> list,
                     T* __restrict__ target)  // [N]
{
  const int64_t i = block_id() * kWarps + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  const int64_t label = labels[i];
  const bool ignored = label == ignore_index;
  NF_DEVICE_CHECK(ignored || (label >= 0 && label < classes),
                  "agent_hinge: expected `labels` in [0, %lld) or ignore_index (%lld), got %lld at row %lld",
                  (long long)classes, (long long)ignore_index, (long long)label, (long long)i);
  double xx = 0, ww = 0, xw = 0;
  if (!ignored)
    for (int64_t d = lane_id(); d < dim; d += kWarp) {
      const double a = x.load<double>(i * dim + d), b = w.load<double>(label * dim + d);
      xx += a * a;
      ww += b * b;
      xw += a * b;
    }
  xx = warp_sum(xx), ww = warp_sum(ww), xw = warp_sum(xw);
  const double x_norm = math::norm_value(2, xx, eps), w_norm = math::norm_value(2, ww, eps);
  const double inverse = ignored ? 0.0 : 1.0 / x_norm;
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    x_hat.store<T>(i * dim + d, ignored ? T(0) : T(x.load<double>(i * dim + d) * inverse));
  for (int64_t k = lane_id(); k < list.listed; k += kWarp)
    list.set(i, k, k == 0 && !ignored ? label : classes, T(0));
  if (lane_id() != 0) return;
  const double distance = ignored ? 0.0 : math::distance_of_cosine(xw / x_norm / w_norm);
  target[i] = T(distance);
  for (int field = 0; field < kHingeFields; ++field) rows.at(HingeField(field), i) = 0;
  rows.at(kHingeInverseNorm, i) = inverse;
  rows.at(kHingeThreshold, i) = ignored ? 0.0 : margin.value() + (triplet ? distance : 0.0);
  rows.at(kHingeBest, i) = -INFINITY;
  rows.at(kHingeBestClass, i) = -1;
}

NF_DEVICE int count_bits(unsigned bits) {
  int count = 0;
  for (; bits != 0; bits &= bits - 1) ++count;
  return count;
}

// A chunk of cosines into the rows' sums and lists. One block per row.
template <class T>
NF_KERNEL(kThreads)
fold_kernel(const T* __restrict__ scores,        // [N, width]
            int64_t width, int64_t first,
            const int64_t* __restrict__ labels,  // [N]
            bool hardest, bool exponential, HingeRows rows, ActiveList<T> list) {
  SharedMemory shared;
  double* scratch = shared.take<double>(kWarps);
  int* counts = shared.take<int>(kWarps);
  const int64_t i = block_id();
  if (rows.ignored(i)) return;  // the whole block leaves
  const int64_t target = labels[i] - first, capacity = hardest ? 0 : list.listed - 1;
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
  rows.at(kHingeSum, i) += sum;
  rows.at(kHingeValue, i) += value;
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
    const double sum = rows.at(kHingeSum, i);
    rows.at(kHingeValue, i) = sum != sum ? sum : double(h.value);  // NaN among the cosines shows
    rows.at(kHingeSlope, i) = double(h.slope);
    if (h.slope != T(0) && list.listed > 1) list.set(i, 1, best_class, h.slope);
  }
  value[i] = T(rows.at(kHingeValue, i));
}

// Cosines -> d loss / d cosine, in place. Blocks: rows x splits of a row.
template <class T>
NF_KERNEL(kThreads)
hinge_gradients_kernel(T* __restrict__ scores,  // [N, width]
                       int64_t width, int64_t first,
                       const int64_t* __restrict__ labels,  // [N]
                       const T* __restrict__ target_factor, const T* __restrict__ hinge_factor,  // [N]
                       bool exponential, HingeRows rows) {
  const int64_t i = block_id();
  const bool ignored = rows.ignored(i);
  const int64_t target = labels[i] - first;
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
unit_features_kernel(StoredArray x, int64_t dim, HingeRows rows, T* __restrict__ x_hat) {
  const int64_t i = block_id() * kWarps + warp_id();
  if (i >= rows.batch) return;
  const bool ignored = rows.ignored(i);
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    x_hat[i * dim + d] = ignored ? T(0) : T(x.load<double>(i * dim + d) * rows.at(kHingeInverseNorm, i));
}

// sum[i] += part[i]
template <class T>
NF_KERNEL(kThreads)
add_kernel(const T* __restrict__ part, int64_t count, T* __restrict__ sum) {
  const int64_t i = block_id() * kThreads + thread_id();
  if (i < count) sum[i] += part[i];
}

// out[r] = inverse (g - y <y, g>), y = inverse own[r], for g(d) = `gradient(d)`; by one warp.
template <class T, class Gradient>
NF_DEVICE void project_row(const StoredArray& own, int64_t r, int64_t dim, T inverse, const Gradient& gradient,
                             const StoredArray& out) {
  T radial = 0;
  for (int64_t d = lane_id(); d < dim; d += kWarp) radial += own.load<T>(r * dim + d) * inverse * gradient(d);
  radial = warp_sum(radial);
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    out.store<T>(r * dim + d, math::normalize_vjp<T>(gradient(d), own.load<T>(r * dim + d) * inverse, radial,
                                                     inverse, T(0)));
}

// dx = P_x(sum). One warp per row.
template <class T>
NF_KERNEL(kThreads)
finish_features_kernel(StoredArray x, int64_t dim, HingeRows rows, const T* __restrict__ sum, StoredArray dx) {
  const int64_t i = block_id() * kWarps + warp_id();
  if (i >= rows.batch) return;  // the whole warp leaves
  if (rows.ignored(i)) {        // whatever it holds, NaN included, has no gradient
    for (int64_t d = lane_id(); d < dim; d += kWarp) dx.store<T>(i * dim + d, T(0));
    return;
  }
  project_row<T>(x, i, dim, T(rows.at(kHingeInverseNorm, i)), [&](int64_t d) { return sum[i * dim + d]; }, dx);
}

struct Pairs {
  StoredArray x, w;        // [N, D], [C, D]
  const int64_t* classes;  // [N, listed]
  int64_t batch, dim, count, listed;
};

// One warp per row of x.
template <class T>
NF_KERNEL(kThreads)
pairs_features_kernel(Pairs pairs, const T* __restrict__ factors, const T* __restrict__ x_inverse,
                      const T* __restrict__ w_inverse, StoredArray dx) {
  const int64_t i = block_id() * kWarps + warp_id(), dim = pairs.dim;
  if (i >= pairs.batch) return;  // the whole warp leaves
  if (x_inverse[i] == T(0)) {    // ignored: whatever it holds, NaN included, has no gradient
    for (int64_t d = lane_id(); d < dim; d += kWarp) dx.store<T>(i * dim + d, T(0));
    return;
  }
  project_row<T>(
      pairs.x, i, dim, x_inverse[i],
      [&](int64_t d) {
        T sum = 0;
        for (int64_t k = i * pairs.listed; k < (i + 1) * pairs.listed; ++k) {
          const int64_t j = pairs.classes[k];
          if (j < pairs.count) sum += factors[k] * (pairs.w.load<T>(j * dim + d) * w_inverse[j]);
        }
        return sum;
      },
      dx);
}

// One warp per entry of `order`; the first of a class sums its run. dw comes in zero.
template <class T>
NF_KERNEL(kThreads)
pairs_weight_kernel(Pairs pairs, const int64_t* __restrict__ order,  // [N * listed]
                    const T* __restrict__ factors, const T* __restrict__ x_inverse,
                    const T* __restrict__ w_inverse, StoredArray dw) {
  const int64_t begin = block_id() * kWarps + warp_id(), total = pairs.batch * pairs.listed, dim = pairs.dim;
  if (begin >= total) return;  // the whole warp leaves
  const int64_t j = pairs.classes[order[begin]];
  if (j >= pairs.count || (begin > 0 && pairs.classes[order[begin - 1]] == j)) return;
  project_row<T>(
      pairs.w, j, dim, w_inverse[j],
      [&](int64_t d) {
        T sum = 0;
        for (int64_t at = begin; at < total && pairs.classes[order[at]] == j; ++at) {
          const int64_t k = order[at], i = k / pairs.listed;
          sum += factors[k] * (pairs.x.load<T>(i * dim + d) * x_inverse[i]);
        }
        return sum;
      },
      dw);
}

template <class T>
T* data_of(const Tensor& t) {
  return t.numel() > 0 ? static_cast<T*>(const_cast<void*>(t.const_data_ptr())) : nullptr;
}

template <class F>
void dispatch_wide(const Tensor& x, const F& f) {
  if (accumulator(x.scalar_type()) == ScalarType::Double)
    f.template operator()<double>();
  else
    f.template operator()<float>();
}

int64_t chunk_of(const Tensor& weight, int64_t class_chunk) {
  return std::max<int64_t>(1, std::min(class_chunk, weight.size(0)));
}

// Unit rows of the classes [first, first + width) and the cosines [N, width] with them.
template <class T>
void score_chunk(Queue& queue, const Tensor& x_hat, const Tensor& weight, int64_t first, int64_t width,
                 double eps, const Tensor& w_hat, T* inverse, const Tensor& scores) {
  const int64_t N = x_hat.size(0), D = x_hat.size(1), item = int64_t(weight.element_size());
  const ScalarType wide = x_hat.scalar_type();
  UnitRows task{static_cast<const char*>(weight.const_data_ptr()) + first * D * item,
                weight.scalar_type(), width, D, 2, eps};
  task.y = w_hat.mutable_data_ptr();
  task.y_type = wide;
  task.inverse = inverse;
  unit_rows(queue, task);
  multiply(x_hat, {x_hat.const_data_ptr(), wide, N, D, D}, Matrix{w_hat.const_data_ptr(), wide, width, D, D}.transposed(),
           {scores.const_data_ptr(), wide, N, width, width});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> agent_hinge(
    Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> margin, double margin_value, bool triplet,
    bool hardest, bool exponential, int64_t ignore_index, double eps, int64_t class_chunk, int64_t capacity) {
  check_head("agent_hinge", x, weight);
  check_labels("agent_hinge", labels, x.size(0));
  Queue queue(x);
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0), chunk = chunk_of(weight, class_chunk);
  const int64_t listed = 1 + std::max<int64_t>(0, capacity);
  const ScalarType wide = accumulator(x.scalar_type());
  Tensor target = device_empty(x, {N}, wide), value = device_empty(x, {N}, wide);
  Tensor rows_tensor = device_empty(x, {kHingeFields, N}, ScalarType::Double);
  Tensor inverse_norm = device_empty(x, {C}, wide);
  Tensor classes = device_empty(x, {N, listed}, ScalarType::Long);
  Tensor slopes = exponential ? device_empty(x, {N, listed}, wide) : device_empty(x, {0}, wide);
  const Tensor x_hat = device_empty(x, {N, D}, wide), w_hat = device_empty(x, {chunk, D}, wide);
  const Tensor scores = device_empty(x, {N, chunk}, wide);
  dispatch_wide(x, [&]<class T>() {
    const HingeRows rows(rows_tensor);
    const ActiveList<T> list{data_of<int64_t>(classes), data_of<T>(slopes), listed};
    launch("prepare_hinge", queue, prepare_hinge_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(x),
           StoredArray(weight), data_of<const int64_t>(labels), D, C, ignore_index, eps,
           Scale(margin, margin_value), triplet, rows, StoredArray(x_hat), list, data_of<T>(target));
    for (int64_t first = 0; first < C; first += chunk) {
      const int64_t width = std::min(chunk, C - first);
      score_chunk<T>(queue, x_hat, weight, first, width, eps, w_hat, data_of<T>(inverse_norm) + first, scores);
      launch("fold", queue, fold_kernel<T>, Grid{N}, kThreads,
             shared_bytes<double>(kWarps) + shared_bytes<int>(kWarps), data_of<const T>(scores), width, first,
             data_of<const int64_t>(labels), hardest, exponential, rows, list);
    }
    launch("finish_hinge", queue, finish_hinge_kernel<T>, thread_per(N), kThreads, 0, hardest, exponential,
           rows, list, data_of<T>(value));
  });
  return {target, value, rows_tensor, inverse_norm, classes, slopes};
}

template <class T>
void backward(Queue& queue, const Tensor& target_factor, const Tensor& hinge_factor, const Tensor& x,
              const Tensor& weight, const Tensor& labels, const Tensor& rows_tensor, const Tensor& inverse_norm,
              bool exponential, double eps, int64_t chunk, Tensor* dx, Tensor* dw) {
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0), item = int64_t(weight.element_size());
  const ScalarType wide = accumulator(x.scalar_type());
  const HingeRows rows(rows_tensor);
  const Tensor x_hat = device_empty(x, {N, D}, wide), w_hat = device_empty(x, {chunk, D}, wide);
  const Tensor scores = device_empty(x, {N, chunk}, wide);
  const bool direct = weight.scalar_type() == wide;  // the product can go where the result will be
  const Tensor product = device_empty(x, {dw != nullptr && !direct ? chunk : 0, D}, wide);
  const Tensor sum = device_empty(x, {dx != nullptr ? N : 0, D}, wide);
  const Tensor part = device_empty(x, {dx != nullptr && chunk < C ? N : 0, D}, wide);
  launch("unit_features", queue, unit_features_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(x), D, rows,
         data_of<T>(x_hat));
  for (int64_t first = 0; first < C; first += chunk) {
    const int64_t width = std::min(chunk, C - first);
    score_chunk<T>(queue, x_hat, weight, first, width, eps, w_hat, nullptr, scores);
    launch("hinge_gradients", queue, hinge_gradients_kernel<T>,
           Grid{N, std::min<int64_t>(64, (width + kThreads - 1) / kThreads)}, kThreads, 0, data_of<T>(scores),
           width, first, data_of<const int64_t>(labels), data_of<const T>(target_factor),
           data_of<const T>(hinge_factor), exponential, rows);
    const Matrix g{scores.const_data_ptr(), wide, N, width, width};
    if (dx != nullptr) {
      multiply(x, g, {w_hat.const_data_ptr(), wide, width, D, D},
               {(first == 0 ? sum : part).const_data_ptr(), wide, N, D, D});
      if (first > 0)
        launch("add", queue, add_kernel<T>, thread_per(N * D), kThreads, 0, data_of<const T>(part), N * D,
               data_of<T>(sum));
    }
    if (dw == nullptr) continue;
    char* out = static_cast<char*>(dw->mutable_data_ptr()) + first * D * item;
    T* into = direct ? reinterpret_cast<T*>(out) : data_of<T>(product);
    multiply(x, g.transposed(), {x_hat.const_data_ptr(), wide, N, D, D}, {into, wide, width, D, D});
    project_rows(queue, {static_cast<const char*>(weight.const_data_ptr()) + first * D * item,
                         weight.scalar_type(), width, D, eps, data_of<const T>(inverse_norm) + first, into, out});
  }
  if (dx != nullptr)
    launch("finish_features", queue, finish_features_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(x), D,
           rows, data_of<const T>(sum), StoredArray(*dx));
}

// Gradients of the shape of x and of the weight, in zeros or uninitialised, or empty.
Tensor gradient_like(const Tensor& t, bool needed, bool zero) {
  if (!needed) return device_empty(t, {0}, t.scalar_type());
  return zero ? torch::stable::new_zeros(t, {t.size(0), t.size(1)}) : torch::stable::empty_like(t);
}

std::tuple<Tensor, Tensor> agent_hinge_backward(Tensor target_factor, Tensor hinge_factor, Tensor x,
                                                Tensor weight, Tensor labels, Tensor rows,
                                                Tensor inverse_norm, bool exponential, double eps,
                                                int64_t class_chunk, bool need_x, bool need_weight) {
  const char* op = "agent_hinge_backward";
  check_head(op, x, weight);
  check_labels(op, labels, x.size(0));
  check_shape(op, "rows", rows, kHingeFields, x.size(0));
  Queue queue(x);
  const bool empty = x.numel() == 0;
  Tensor dx = gradient_like(x, need_x, false), dw = gradient_like(weight, need_weight, empty);
  if (empty) return {dx, dw};
  dispatch_wide(x, [&]<class T>() {
    backward<T>(queue, target_factor, hinge_factor, x, weight, labels, rows, inverse_norm, exponential, eps,
                chunk_of(weight, class_chunk), need_x ? &dx : nullptr, need_weight ? &dw : nullptr);
  });
  return {dx, dw};
}

std::tuple<Tensor, Tensor> cosine_pairs_backward(Tensor factors, Tensor classes, Tensor order, Tensor x,
                                                 Tensor weight, Tensor x_inverse, Tensor weight_inverse,
                                                 bool need_x, bool need_weight) {
  const char* op = "cosine_pairs_backward";
  check_head(op, x, weight);
  check_shape(op, "classes", classes, x.size(0), classes.size(1));
  check_shape(op, "factors", factors, x.size(0), classes.size(1));
  Queue queue(x);
  Tensor dx = gradient_like(x, need_x, false), dw = gradient_like(weight, need_weight, true);
  const Pairs pairs{StoredArray(x), StoredArray(weight), data_of<const int64_t>(classes), x.size(0), x.size(1),
                    weight.size(0), classes.size(1)};
  dispatch_wide(x, [&]<class T>() {
    const T *f = data_of<const T>(factors), *xi = data_of<const T>(x_inverse), *wi = data_of<const T>(weight_inverse);
    if (need_x)
      launch("pairs_features", queue, pairs_features_kernel<T>, warp_per_row(pairs.batch), kThreads, 0, pairs, f,
             xi, wi, StoredArray(dx));
    if (need_weight)
      launch("pairs_weight", queue, pairs_weight_kernel<T>, warp_per_row(pairs.batch * pairs.listed), kThreads,
             0, pairs, data_of<const int64_t>(order), f, xi, wi, StoredArray(dw));
  });
  return {dx, dw};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  m.impl("agent_hinge", TORCH_BOX(&nf::agent_hinge));
  m.impl("agent_hinge_backward", TORCH_BOX(&nf::agent_hinge_backward));
  m.impl("cosine_pairs_backward", TORCH_BOX(&nf::cosine_pairs_backward));
}
