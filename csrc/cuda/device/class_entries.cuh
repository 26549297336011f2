// Entries of a list that name a class each, found by the class: whoever sums over the entries of a class takes them in
// the order of the list, and long sums are made run by run, by many warps.
//
// A counting sort. Integer atomics say how many a class has and give each a place among them; which one, and where in
// memory the class's places begin, depends on who comes first. Then every entry counts those before it, which puts them
// in order: nothing that comes out depends on who came when.
#pragma once

#include "checks.h"
#include "cuda/device/per_row.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/products/cublas.h"
#include "engine/accumulator.h"
#include "engine/agent_arguments.h"

namespace nf {
namespace {

// Entries of a run, which one warp sums. A class with fewer is summed by whoever wants the sum.
constexpr int kEntryRun = 128;

struct ClassEntries {
  const int64_t* classes;  // [total]: what is no class is left out
  int64_t total, count;    // entries and classes
  int* number;             // [count], all 0 before: entries of a class
  int64_t* begin;          // [count]: where they lie in `places` and `order`
  int64_t* taken;          // [], 0 before: of places, by now
  int* rank;               // [total]: of an entry among those of its class
  int64_t* places;         // [total]: entries, those of a class side by side
  int64_t* order;          // [total]: the same in order

  NF_DEVICE bool has(int64_t k) const { return k < total && is_class(classes[k], count); }
};

// One thread per entry, here and below.
NF_KERNEL(kThreads)
count_entries_kernel(ClassEntries entries) {
  const int64_t k = block_id() * kThreads + thread_id();
  if (entries.has(k)) entries.rank[k] = atomic_add(entries.number + entries.classes[k], 1);
}

// The first of a class takes room for all.
NF_KERNEL(kThreads)
reserve_places_kernel(ClassEntries entries) {
  const int64_t k = block_id() * kThreads + thread_id();
  if (!entries.has(k) || entries.rank[k] != 0) return;
  const int64_t j = entries.classes[k];
  entries.begin[j] = atomic_add(entries.taken, int64_t(entries.number[j]));
}

NF_KERNEL(kThreads)
place_entries_kernel(ClassEntries entries) {
  const int64_t k = block_id() * kThreads + thread_id();
  if (entries.has(k)) entries.places[entries.begin[entries.classes[k]] + entries.rank[k]] = k;
}

NF_KERNEL(kThreads)
rank_entries_kernel(ClassEntries entries) {
  const int64_t k = block_id() * kThreads + thread_id();
  if (!entries.has(k)) return;
  const int64_t j = entries.classes[k], begin = entries.begin[j];
  const int number = entries.number[j];
  int rank = 0;
#pragma unroll 4
  for (int other = 0; other < number; ++other) rank += entries.places[begin + other] < k;
  entries.rank[k] = rank;
  entries.order[begin + rank] = k;
}

// Sums over the entries of a class. `value(k, d)` is what entry k adds to column d, in T.
template <class T>
struct EntrySums {
  ClassEntries entries;
  int64_t dim;
  double*
      runs;  // [total / kEntryRun + 1, dim]: of whole runs, each at its first place / kEntryRun; no two are the same

  // One by one from the place `at` on; the loads of several run at a time.
  template <class Value>
  NF_DEVICE double one_by_one(int64_t at, int64_t end, int64_t d, const Value& value) const {
    constexpr int kAtOnce = 4;
    LongSum<T> sum;
#pragma unroll 1
    for (; at + kAtOnce <= end; at += kAtOnce) {
      T part[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) part[u] = value(entries.order[at + u], d);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) sum.add(part[u]);
    }
#pragma unroll 1
    for (; at < end; ++at) sum.add(value(entries.order[at], d));
    return sum.total();
  }

  // The sum of the run that begins with entry k, if one does. One warp.
  template <class Value>
  NF_DEVICE void write_run(int64_t k, const Value& value) const {
    if (!entries.has(k)) return;
    const int64_t j = entries.classes[k], at = entries.begin[j] + entries.rank[k];
    if (entries.rank[k] % kEntryRun != 0 || entries.rank[k] + kEntryRun > entries.number[j]) return;
    for (int64_t d = lane_id(); d < dim; d += kWarp)
      runs[at / kEntryRun * dim + d] = one_by_one(at, at + kEntryRun, d, value);
  }

  // The sum over the class of entry k, the first of its class, when the runs are known.
  template <class Value>
  NF_DEVICE T of_class(int64_t k, int64_t d, const Value& value) const {
    const int64_t j = entries.classes[k], begin = entries.begin[j];
    const int64_t end = begin + entries.number[j];
    int64_t at = begin;
    double sum = 0;
#pragma unroll 4
    for (; at + kEntryRun <= end; at += kEntryRun) sum += runs[at / kEntryRun * dim + d];
    return T(sum + one_by_one(at, end, d, value));
  }

  // Whether k is the first of its class.
  NF_DEVICE bool leads(int64_t k) const { return entries.has(k) && entries.rank[k] == 0; }
};

// The memory of a list's entries, sorted.
struct SortedEntries {
  Tensor counters, begin, within, places, order;
  ClassEntries entries;

  SortedEntries(Queue& queue, const Tensor& like, const int64_t* classes, int64_t total, int64_t count)
      : counters(torch::stable::new_zeros(like, {count + 2}, ScalarType::Int)),
        begin(device_empty(like, {count}, ScalarType::Long)),
        within(device_empty(like, {total}, ScalarType::Int)),
        places(device_empty(like, {total}, ScalarType::Long)),
        order(device_empty(like, {total}, ScalarType::Long)),
        entries{classes,
                total,
                count,
                data_of<int>(counters) + 2,
                data_of<int64_t>(begin),
                reinterpret_cast<int64_t*>(data_of<int>(counters)),
                data_of<int>(within),
                data_of<int64_t>(places),
                data_of<int64_t>(order)} {
    const auto run = [&](const char* name, void (*kernel)(ClassEntries)) {
      launch(name, queue, kernel, thread_per(total), kThreads, 0, entries);
    };
    run("count_entries", count_entries_kernel);
    run("reserve_places", reserve_places_kernel);
    run("place_entries", place_entries_kernel);
    run("rank_entries", rank_entries_kernel);
  }

  // Room for the sums of runs; none where no class can have a whole one.
  Tensor room_for_runs(const Tensor& like, int64_t dim) const {
    const bool any = entries.total >= kEntryRun;
    return device_empty(like, {any ? entries.total / kEntryRun + 1 : 0, dim}, ScalarType::Double);
  }
};

}  // namespace
}  // namespace nf
