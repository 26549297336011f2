// Classes that own many rows of a batch: the sums over their targets, made by many blocks before dW is finished
// (class_gradient.cuh), where one warp has all the rows of a class.
#pragma once

#include "cuda/device/class_gradient.cuh"
#include "cuda/device/per_row.cuh"
#include "engine/block.h"

namespace nf {
namespace {

// Rows of a batch up to which nobody looks for such classes.
constexpr int64_t kFewRows = 128;

// The classes that own more than kFewTargets rows of a chunk of kHotRows, and the sums over those rows. Blocks: chunks
// x groups of kWarp columns.
NF_KERNEL(kThreads)
hot_targets_kernel(ClassGradient task) {
  constexpr int kWarps = kThreads / kWarp, kBuckets = 2048, kNoClass = -1;
  SharedMemory shared;
  int64_t* labels = shared.take<int64_t>(kHotRows);
  int* rows =
      shared.take<int>(kBuckets);  // with a label that falls there; later the first row of each hot class
  int* firsts =
      shared.take<int>(kHotRows);  // how many rows the class has whose first one this is; 0: it is not hot
  double* parts = shared.take<double>(kThreads);
  const HotTargets& hot = task.hot;
  const int64_t chunk = block_id(), begin = chunk * kHotRows;
  const int count = int(begin + kHotRows < task.batch ? kHotRows : task.batch - begin);
  const auto bucket_of = [](int64_t label) { return int(uint64_t(label) * 0x9e3779b97f4a7c15u >> 53); };
  static_assert(kBuckets == 1 << (64 - 53));

  for (int b = thread_id(); b < kBuckets; b += kThreads) rows[b] = 0;
  for (int r = thread_id(); r < count; r += kThreads) {
    const int64_t i = begin + r;
    labels[r] = task.target[i] != 0.0 && task.labels[i] >= 0 ? task.labels[i] : kNoClass;
  }
  sync_block();  // the zeros and the labels, before anyone counts
  for (int r = thread_id(); r < count; r += kThreads)
    if (labels[r] != kNoClass) atomic_add(rows + bucket_of(labels[r]), 1);
  sync_block();  // the counts, before they are read
  for (int r = thread_id(); r < count; r += kThreads) {
    const int64_t label = labels[r];
    int alike = 0, earlier = 0;
    // A bucket with few rows has no hot class; one with many may be several classes'.
    if (label != kNoClass && rows[bucket_of(label)] > kFewTargets)
      for (int k = 0; k < count; ++k) {
        alike += labels[k] == label;
        earlier += k < r && labels[k] == label;
      }
    firsts[r] = earlier == 0 && alike > kFewTargets ? alike : 0;
  }
  sync_block();  // the counts' last reads, before their place is used anew; and firsts, before they are read

  // The hot classes in the order of their first rows. Every warp finds the same.
  int found = 0;
  for (int base = 0; base < count; base += kWarp) {
    const int r = base + lane_id();
    const int alike = r < count ? firsts[r] : 0;
    const unsigned here = warp_ballot(alike > 0);
    const int slot = found + count_bits(here & ((1u << lane_id()) - 1u));
    if (alike > 0 && warp_id() == 0) {
      rows[slot] = r;
      if (block_y() == 0) {
        hot.labels[chunk * kHotSlots + slot] = labels[r];
        hot.rows[chunk * kHotSlots + slot] = alike;
      }
    }
    found += count_bits(here);
  }
  if (thread_id() == 0 && block_y() == 0) hot.counts[chunk] = found;
  sync_block();  // the first rows, before they are read

  const int64_t d = block_y() * kWarp + lane_id();
  const int per_warp = (count + kWarps - 1) / kWarps, from = warp_id() * per_warp;
  const int to = from + per_warp < count ? from + per_warp : count;
  for (int slot = 0; slot < found; ++slot) {
    const int64_t label = labels[rows[slot]];
    double sum = 0;
    task.x.visit<double>([&](const auto* x) {
#pragma unroll 1
      for (int base = from; base < to; base += kWarp) {
        unsigned left = warp_ballot(base + lane_id() < to && labels[base + lane_id()] == label);
#pragma unroll 1
        while (left != 0) {
          constexpr int kAtOnce = 4;  // loads under way
          double part[kAtOnce];
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u, left &= left - 1) {
            const int64_t i = begin + base + (left != 0 ? lowest_bit(left) : 0);
            part[u] = left != 0 && d < task.dim
                          ? task.target[i] * (double(x[i * task.dim + d]) * task.outer[i] * task.inner[i])
                          : 0.0;
          }
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u) sum += part[u];
        }
      }
    });
    parts[thread_id()] = sum;
    sync_block();  // the warps' parts, before they are added
    if (warp_id() == 0 && d < task.dim) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += parts[w * kWarp + lane_id()];
      hot.sums[(chunk * kHotSlots + slot) * task.dim + d] = total;
    }
    sync_block();  // the parts' reads, before the next class's
  }
}

// The memory for it; none where nobody looks.
struct HotRoom {
  Array sums, labels, rows, counts;

  HotRoom() = default;
  HotRoom(Block& block, int64_t batch, int64_t dim) {
    if (batch <= kFewRows || dim == 0) return;
    const int64_t slots = batch / kHotRows * kHotSlots + batch % kHotRows / (kFewTargets + 1);
    sums = block.array<double>(slots * dim);
    labels = block.array<int64_t>(slots);
    rows = block.array<int>(slots);
    counts = block.array<int>((batch + kHotRows - 1) / kHotRows);
  }

  bool wanted() const { return counts.count() > 0; }
  HotTargets targets() const {
    return {data_of<int>(counts), data_of<int64_t>(labels), data_of<int>(rows), data_of<double>(sums)};
  }
};

void find_hot_targets(Queue& queue, const ClassGradient& task) {
  const Grid grid{(task.batch + kHotRows - 1) / kHotRows, (task.dim + kWarp - 1) / kWarp};
  launch("hot_targets", queue, hot_targets_kernel, grid, kThreads,
         shared_bytes<int64_t>(kHotRows) + shared_bytes<int>(2048) + shared_bytes<int>(kHotRows) +
             shared_bytes<double>(kThreads),
         task);
}

}  // namespace
}  // namespace nf
