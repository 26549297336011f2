// Cosines of listed pairs of a feature and an agent on CUDA: target_cosine, and the gradients of a
// weighted sum of listed cosines. One warp owns each row of a result, and adds up in the order of the list.
#include "cuda/device/class_entries.cuh"
#include "cuda/device/per_row.cuh"
#include "cuda/device/project_row.cuh"
#include "cuda/device/row_cosine.cuh"
#include "cuda/host/agents.h"
#include "cuda/host/outputs.h"
#include "math/centers.h"

namespace nf {
namespace {

// cosine[i] = cos(x_i, w_labels[i]); 0 where the agent is not here. One warp per row.
NF_KERNEL(kThreads)
target_cosine_kernel(StoredArray x, StoredArray w,        // [N, D], [C, D]
                     const int64_t* __restrict__ labels,  // [N]
                     int64_t batch, int64_t dim, int64_t classes, int64_t ignore_index, double eps,
                     bool is_shard, double* __restrict__ cosine)  // [N]
{
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= batch) return;  // the whole warp leaves
  const int64_t label = labels[i];
  const bool elsewhere = label == ignore_index || (is_shard && label == kElsewhere);
  NF_DEVICE_CHECK(
      elsewhere || (label >= 0 && label < classes),
      "target_cosine: expected `labels` in [0, %lld) or ignore_index (%lld), got %lld at row %lld",
      (long long)classes, (long long)ignore_index, (long long)label, (long long)i);
  const double found = elsewhere ? 0.0 : row_cosine(x, i, w, label, dim, eps).cosine;
  if (lane_id() == 0) cosine[i] = found;
}

// place[i] = the row of w nearest to x_i among the `centers` of its label's class. One warp per row.
NF_KERNEL(kThreads)
target_center_kernel(StoredArray x, StoredArray w,        // [N, D], [classes centers, D]
                     const int64_t* __restrict__ labels,  // [N]
                     int64_t batch, int64_t dim, int64_t classes, int64_t centers, int64_t ignore_index,
                     double eps, bool is_shard, int64_t* __restrict__ place)  // [N]
{
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= batch) return;  // the whole warp leaves
  const int64_t label = labels[i];
  const bool ignored = label == ignore_index, elsewhere = is_shard && label == kElsewhere;
  NF_DEVICE_CHECK(
      ignored || elsewhere || (label >= 0 && label < classes),
      "target_center: expected `labels` in [0, %lld) or ignore_index (%lld), got %lld at row %lld",
      (long long)classes, (long long)ignore_index, (long long)label, (long long)i);
  int64_t found = ignored ? kIgnored : kElsewhere;
  if (!ignored && !elsewhere) {
    const int64_t first = label * centers;
    found = first + math::winner<double>(centers, [&](int64_t k) {
                      return row_cosine(x, i, w, first + k, dim, eps).cosine;
                    }).center;
  }
  if (lane_id() == 0) place[i] = found;
}

struct Pairs {
  StoredArray x, w;        // [N, D], [C, D]
  const int64_t* classes;  // [N, listed]
  int64_t batch, dim, count, listed;
  double eps;

  NF_HD int64_t entries() const { return batch * listed; }
};

// How the class of each entry of the list was scaled, and behind them every row of x: the sums over pairs
// have no room to see to a row that has to be summed anew.
template <class T>
struct PairScales {
  T* data;  // [N * listed + N, 2]: outer, inner

  NF_DEVICE T unit(T value, int64_t k) const { return value * data[2 * k] * data[2 * k + 1]; }
  NF_DEVICE math::RowScale<T> at(int64_t k) const {
    const T outer = data[2 * k], inner = data[2 * k + 1];
    return {outer, inner, T(1) / (outer * inner)};
  }
};

// One thread per entry; a row that has to be summed anew is the work of its whole warp.
template <class T>
NF_KERNEL(kThreads)
pair_scales_kernel(Pairs pairs, const T* __restrict__ x_inverse, const T* __restrict__ w_inverse,
                   PairScales<T> scales) {
  const int64_t k = block_id() * kThreads + thread_id(), entries = pairs.batch * pairs.listed;
  const bool of_class = k < entries;
  const int64_t r = of_class ? pairs.classes[k] : k - entries;
  const bool here = is_class(r, of_class ? pairs.count : pairs.batch);
  const T inverse = !here ? T(1) : of_class ? w_inverse[r] : x_inverse[r];
  math::RowScale<T> scale{inverse, T(1), T(1)};
  for (unsigned left = warp_ballot(!math::inverse_serves(inverse)); left != 0; left &= left - 1) {
    const int lane = lowest_bit(left);
    StoredArray rows = pairs.x;
    if (shuffle(int(of_class), lane) != 0) rows = pairs.w;
    const auto anew = scale_again(rows, shuffle(r, lane), pairs.dim, T(pairs.eps), shuffle(inverse, lane));
    if (lane_id() == lane) scale = anew;
  }
  if (here) scales.data[2 * k] = scale.outer, scales.data[2 * k + 1] = scale.inner;
}

// One warp per row of x.
template <class T>
NF_KERNEL(kThreads)
pairs_features_kernel(Pairs pairs, const T* __restrict__ factors, PairScales<T> scales, StoredArray dx) {
  const int64_t i = block_id() * kRowsPerBlock + warp_id(), dim = pairs.dim;
  if (i >= pairs.batch) return;  // the whole warp leaves
  bool mine = false;
  for (int64_t k = lane_id(); k < pairs.listed; k += kWarp)
    mine = mine || is_class(pairs.classes[i * pairs.listed + k], pairs.count);
  if (!warp_any(mine)) {  // an ignored row, above all: whatever it holds, NaN included, has no gradient
    clear_row<T>(i, dim, dx);
    return;
  }
  project_row<T>(
      pairs.x, i, dim, pairs.eps, scales.at(pairs.batch * pairs.listed + i),
      [&](int64_t d) {
        LongSum<T> sum;
#pragma unroll 1
        for (int64_t k = i * pairs.listed; k < (i + 1) * pairs.listed; ++k) {
          const int64_t j = pairs.classes[k];
          if (is_class(j, pairs.count)) sum.add(factors[k] * scales.unit(pairs.w.load<T>(j * dim + d), k));
        }
        return sum.value();
      },
      dx);
}

// The gradient of the weight: what an entry says to its class.
template <class T>
struct PairsWeight {
  Pairs pairs;
  const T* factors;  // [N, listed]
  PairScales<T> scales;
  EntrySums<T> sums;
  StoredArray dw;

  // f(value), with what entry k says to column d.
  template <class F>
  NF_DEVICE void with_value(const F& f) const {
    pairs.x.template visit<T>([&](const auto* x) {
      f([&](int64_t k, int64_t d) {
        const int64_t i = k / pairs.listed;
        return factors[k] * scales.unit(T(x[i * pairs.dim + d]), pairs.entries() + i);
      });
    });
  }
};

// One warp per entry.
template <class T>
NF_KERNEL(kThreads)
pairs_runs_kernel(PairsWeight<T> task) {
  const int64_t own = block_id() * kRowsPerBlock + warp_id();
  task.with_value([&](const auto& value) { task.sums.write_run(own, value); });
}

// One warp per entry; the first of a class sums all of them. dw comes in zero.
template <class T>
NF_KERNEL_RESIDENT(kThreads, 4)
pairs_weight_kernel(PairsWeight<T> task) {
  const int64_t own = block_id() * kRowsPerBlock + warp_id();
  if (!task.sums.leads(own)) return;  // the whole warp leaves
  const Pairs& pairs = task.pairs;
  task.with_value([&](const auto& value) {
    project_row<T>(
        pairs.w, pairs.classes[own], pairs.dim, pairs.eps, task.scales.at(own),
        [&](int64_t d) { return task.sums.of_class(own, d, value); }, task.dw);
  });
}

// The gradient of the weight, which comes in zero.
template <class T>
void pairs_weight(Queue& queue, const Pairs& pairs, const T* factors, const PairScales<T>& scales,
                  const Tensor& like, const Tensor& dw) {
  const int64_t count = pairs.entries();
  const SortedEntries sorted(queue, like, pairs.classes, count, pairs.count);
  const Tensor runs = sorted.room_for_runs(like, pairs.dim);
  const PairsWeight<T> task{
      pairs, factors, scales, {sorted.entries, pairs.dim, data_of<double>(runs)}, StoredArray(dw)};
  if (runs.numel() > 0)
    launch("pairs_runs", queue, pairs_runs_kernel<T>, warp_per_row(count), kThreads, 0, task);
  launch("pairs_weight", queue, pairs_weight_kernel<T>, warp_per_row(count), kThreads, 0, task);
}

}  // namespace

Tensor target_cosine(const TargetCosineArguments& in) {
  check(in);
  const Tensor &x = in.x, &weight = in.weight;
  Queue queue(x);
  const Tensor out = device_empty(x, {x.size(0)}, ScalarType::Double);
  launch("target_cosine", queue, target_cosine_kernel, warp_per_row(x.size(0)), kThreads, 0, StoredArray(x),
         StoredArray(weight), data_of<const int64_t>(in.labels), x.size(0), x.size(1), weight.size(0),
         in.ignore_index, in.eps, in.is_shard, data_of<double>(out));
  return out;
}

namespace {

Tensor target_center(const TargetCenterArguments& in) {
  check(in);
  const Tensor &x = in.x, &weight = in.weight;
  Queue queue(x);
  const Tensor out = device_empty(x, {x.size(0)}, ScalarType::Long);
  launch("target_center", queue, target_center_kernel, warp_per_row(x.size(0)), kThreads, 0, StoredArray(x),
         StoredArray(weight), data_of<const int64_t>(in.labels), x.size(0), x.size(1),
         weight.size(0) / in.centers, in.centers, in.ignore_index, in.eps, in.is_shard,
         data_of<int64_t>(out));
  return out;
}

std::tuple<Tensor, Tensor> cosine_pairs_backward(const CosinePairsBackwardArguments& in) {
  check(in);
  const Tensor &x = in.x, &weight = in.weight;
  Queue queue(x);
  Tensor dx = partial_gradient_like(x, in.need_x, in.is_shard),
         dw = gradient_like(weight, in.need_weight, true);
  const Pairs pairs{StoredArray(x),
                    StoredArray(weight),
                    data_of<const int64_t>(in.classes),
                    x.size(0),
                    x.size(1),
                    weight.size(0),
                    in.classes.size(1),
                    in.eps};
  dispatch_accumulator(x.scalar_type(), [&]<class T>() {
    const T* f = data_of<const T>(in.factors);
    const int64_t count = pairs.entries() + pairs.batch;
    const Tensor table = device_empty(x, {count, 2}, accumulator(x.scalar_type()));
    const PairScales<T> scales{data_of<T>(table)};
    launch("pair_scales", queue, pair_scales_kernel<T>, thread_per(count), kThreads, 0, pairs,
           data_of<const T>(in.x_inverse), data_of<const T>(in.weight_inverse), scales);
    if (in.need_x)
      launch("pairs_features", queue, pairs_features_kernel<T>, warp_per_row(pairs.batch), kThreads, 0, pairs,
             f, scales, StoredArray(dx));
    if (in.need_weight) pairs_weight(queue, pairs, f, scales, x, dw);
  });
  return {dx, dw};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  nf::implement<&nf::target_cosine>(m);
  nf::implement<&nf::target_center>(m);
  nf::implement<&nf::cosine_pairs_backward>(m);
}
