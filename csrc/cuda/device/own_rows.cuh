// The gradient of agents that only the rows with their own label move (inner_distance.cu).
#pragma once

#include "cuda/device/class_entries.cuh"
#include "cuda/device/stored.cuh"
#include "math/distance.h"

namespace nf {
namespace {

// dw[y_i] from the rows with that label alone.
template <class T>
struct OwnRows {
  StoredArray g, x, w;  // [N, C], [N, D], [C, D]
  int64_t dim, classes;
  int p;
  EntrySums<T> sums;  // of the labels [N]
  StoredArray dw;     // in zeros before

  // f(value), with what row i says to column d of its agent.
  template <class F>
  NF_DEVICE void with_value(const F& f) const {
    x.template visit<T>([&](const auto* rows) {
      f([&](int64_t i, int64_t d) {
        const int64_t label = sums.entries.classes[i];
        const T difference = w.template load<T>(label * dim + d) - T(rows[i * dim + d]);
        return g.template load<T>(i * classes + label) * math::distance_term<T>(p, difference).slope;
      });
    });
  }
};

// One warp per row.
template <class T>
NF_KERNEL_RESIDENT(kThreads, 4)
own_rows_runs_kernel(OwnRows<T> task) {
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  task.with_value([&](const auto& value) { task.sums.write_run(i, value); });
}

// One warp per row; the first of a class sums all of them.
template <class T>
NF_KERNEL(kThreads)
own_rows_gradient_kernel(OwnRows<T> task) {
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  const ClassEntries& entries = task.sums.entries;
  if (i >= entries.total) return;  // the whole warp leaves, here and below
  const int64_t label = entries.classes[i];
  NF_DEVICE_CHECK(label >= 0 && label < task.classes,
                  "inner_distance: expected `labels` in [0, %lld), got %lld at row %lld",
                  (long long)task.classes, (long long)label, (long long)i);
  if (!task.sums.leads(i)) return;
  task.with_value([&](const auto& value) {
#pragma unroll 1
    for (int64_t d = lane_id(); d < task.dim; d += kWarp)
      task.dw.template store<T>(label * task.dim + d, task.sums.of_class(i, d, value));
  });
}

// The gradient of the agents, which comes in zero, from the rows' own ones.
template <class T>
void own_rows_gradient(Queue& queue, const Tensor& grad, const Tensor& x, const Tensor& weight,
                       const Tensor& labels, int p, const Tensor& dw) {
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0);
  const SortedEntries sorted(queue, x, data_of<const int64_t>(labels), N, C);
  const Tensor runs = sorted.room_for_runs(x, D);
  const OwnRows<T> task{StoredArray(grad),
                        StoredArray(x),
                        StoredArray(weight),
                        D,
                        C,
                        p,
                        {sorted.entries, D, data_of<double>(runs)},
                        StoredArray(dw)};
  if (runs.numel() > 0)
    launch("own_rows_runs", queue, own_rows_runs_kernel<T>, warp_per_row(N), kThreads, 0, task);
  launch("own_rows_gradient", queue, own_rows_gradient_kernel<T>, warp_per_row(N), kThreads, 0, task);
}

}  // namespace
}  // namespace nf
