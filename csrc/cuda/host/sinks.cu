// The active list and the hardest class of every row, from a chunk of coefficients or of scores in memory. Blocks
// share a row where rows are few; what they find is put together in the order of the classes, so that nothing depends
// on who comes first.
#include <device/arrival.cuh>

#include "cuda/device/per_row.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/row_splits.cuh"
#include "cuda/host/sinks.h"

namespace nf {
namespace {

// counts[split, i] = the active classes of a part of row i. E is the type of the coefficients. Blocks: rows x splits.
template <class T, class E>
NF_KERNEL(kThreads)
count_active_kernel(ListActive<T> task) {
  SharedMemory shared;
  int* scratch = shared.take<int>(kThreads / kWarp);
  const int64_t i = block_id();
  const E* row = static_cast<const E*>(task.e) + i * task.chunk.stride;
  const RowSplit mine = row_split(task.chunk.width);
  int count = 0;
  for (int64_t j = mine.begin + thread_id(); j < mine.end; j += kThreads) count += !(T(row[j]) == T(0));
  count = block_sum(count, scratch);
  if (thread_id() == 0) task.counts[block_y() * task.rows.batch + i] = count;
}

// A part of a row goes where the parts before it end. Blocks: rows x splits.
template <class T, class E>
NF_KERNEL(kThreads)
list_active_kernel(ListActive<T> task) {
  constexpr int kWarps = kThreads / kWarp;
  SharedMemory shared;
  int64_t* scratch = shared.take<int64_t>(kWarps);
  int* of_warps = shared.take<int>(2 * kWarps);  // two rounds, in turn
  const int64_t i = block_id(), batch = task.rows.batch;
  const SinkChunk& chunk = task.chunk;
  const E* row = static_cast<const E*>(task.e) + i * chunk.stride;
  int64_t* listed = task.listed + i * task.capacity;
  T* found = task.found + i * task.capacity;
  int64_t place = 0;
  for (int64_t k = thread_id(); k < block_y(); k += kThreads) place += task.counts[k * batch + i];
  place = (chunk.begins() ? 0 : task.before[i]) + block_sum(place, scratch);
  const RowSplit mine = row_split(chunk.width);
  const bool counts = task.rows.at(kRowWeight, i) != 0.0;
  if (!counts) place = 0;
  for (int64_t base = mine.begin, turn = 0; counts && base < mine.end && place < task.capacity;
       base += kThreads, turn ^= 1) {
    const int64_t j = base + thread_id();
    const T e = j < mine.end ? T(row[j]) : T(0);
    const unsigned active = warp_ballot(!(e == T(0)));
    int* of_round = of_warps + turn * kWarps;
    if (lane_id() == 0) of_round[warp_id()] = count_bits(active);
    sync_block();  // the warps' counts, before they are read; their reads, before the round after the next
    int64_t own = place + count_bits(active & ((1u << lane_id()) - 1u));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp_id()) own += of_round[w];
      place += of_round[w];
    }
    if (!(e == T(0)) && own < task.capacity) {
      listed[own] = chunk.first + j;
      found[own] = e;
    }
  }
  if (block_y() + 1 < block_count_y()) return;
  if (chunk.ends())
    for (int64_t k = place + thread_id(); k < task.capacity; k += kThreads) {
      listed[k] = chunk.classes;
      found[k] = T(0);
    }
  if (thread_id() == 0) task.after[i] = place;
}

template <class T>
struct Candidate {
  T cosine;
  int64_t place;

  // NaN is larger than any number, and of equal ones the first is meant.
  NF_DEVICE bool beats(const Candidate& other) const {
    const bool nan = cosine != cosine, other_nan = other.cosine != other.cosine;
    if (nan != other_nan) return nan;
    if (!nan && cosine != other.cosine) return cosine > other.cosine;
    return place < other.place;
  }
};

// The best of what the block's threads have; thread 0 knows it. scratch: one of each per warp.
template <class T>
NF_DEVICE Candidate<T> block_best(Candidate<T> best, T* cosines, int64_t* places) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Candidate<T> other{shuffle_xor(best.cosine, mask), shuffle_xor(best.place, mask)};
    if (other.beats(best)) best = other;
  }
  sync_block();  // an earlier call's reads of scratch, before this one's writes
  if (lane_id() == 0) cosines[warp_id()] = best.cosine, places[warp_id()] = best.place;
  sync_block();  // the warps' best, before thread 0 compares them
  if (thread_id() != 0) return best;
  for (int w = 1; w < kThreads / kWarp; ++w) {
    const Candidate<T> other{cosines[w], places[w]};
    if (other.beats(best)) best = other;
  }
  return best;
}

// Blocks: rows x splits. The last of a row to come has the best of all.
template <class T, class Term>
NF_KERNEL(kThreads)
find_hardest_kernel(FindHardest<T> task) {
  constexpr int kWarps = kThreads / kWarp;
  SharedMemory shared;
  T* cosines = shared.take<T>(kWarps);
  int64_t* places = shared.take<int64_t>(kWarps);
  const int64_t i = block_id();
  const SinkChunk& chunk = task.chunk;
  const int64_t target = target_place(task.terms.labels[i], chunk.first, chunk.width);
  const bool counts = task.rows.at(kRowWeight, i) != 0.0;
  Candidate<T> best{-T(INFINITY), chunk.classes};
  const RowSplit mine = row_split(chunk.width);
  for (int64_t k = mine.begin + thread_id(); counts && k < mine.end; k += kThreads) {
    const Candidate<T> here{task.scores[i * chunk.stride + k], chunk.first + k};
    if (k != target && here.beats(best)) best = here;
  }
  best = block_best(best, cosines, places);
  const int64_t splits = block_count_y(), batch = task.rows.batch;
  if (splits > 1) {
    if (thread_id() == 0) {
      task.cosines[block_y() * batch + i] = best.cosine;
      task.places[block_y() * batch + i] = best.place;
    }
    if (!last_to_arrive(task.arrivals + i, unsigned(splits))) return;
    best = {-T(INFINITY), chunk.classes};
    for (int64_t k = thread_id(); k < splits; k += kThreads) {
      const Candidate<T> other{task.cosines[k * batch + i], task.places[k * batch + i]};
      if (other.beats(best)) best = other;
    }
    best = block_best(best, cosines, places);
  }
  if (thread_id() != 0) return;
  if (!chunk.begins()) {
    const Candidate<T> before{task.found[i], task.listed[i]};
    if (before.beats(best)) best = before;
  }
  task.listed[i] = best.place;
  task.found[i] = best.cosine;
  if (!chunk.ends()) return;
  if (task.need_largest) task.rows.at(kLargestCosine, i) = double(best.cosine);
  math::Cell<T> cell{};
  if (best.place < chunk.classes)
    cell = Term(task.terms.template at<T>(i), task.terms.numbers).at(best.cosine, math::PlainExp());
  task.rows.at(kSum, i) = double(cell.value);
  task.rows.at(kSecondSum, i) = double(cell.second);
}

}  // namespace

template <class T>
void list_active(Queue& queue, const ListActive<T>& task) {
  const Grid grid{task.rows.batch, task.splits};
  constexpr int kWarps = kThreads / kWarp;
  const auto run = [&]<class E>() {
    if (task.splits > 1)
      launch("count_active", queue, count_active_kernel<T, E>, grid, kThreads, shared_bytes<int>(kWarps),
             task);
    launch("list_active", queue, list_active_kernel<T, E>, grid, kThreads,
           shared_bytes<int64_t>(kWarps) + shared_bytes<int>(2 * kWarps), task);
  };
  if constexpr (std::is_same_v<T, float>)
    if (task.e_is_bfloat16) return run.template operator()<BFloat16>();
  run.template operator()<T>();
}

template <class T>
void find_hardest(Queue& queue, const FindHardest<T>& task) {
  constexpr int kWarps = kThreads / kWarp;
  dispatch_term<T>(task.terms.term, [&]<class Term>() {
    launch("find_hardest", queue, find_hardest_kernel<T, Term>, Grid{task.rows.batch, task.splits}, kThreads,
           shared_bytes<T>(kWarps) + shared_bytes<int64_t>(kWarps), task);
  });
}

template void list_active(Queue&, const ListActive<float>&);
template void list_active(Queue&, const ListActive<double>&);
template void find_hardest(Queue&, const FindHardest<float>&);
template void find_hardest(Queue&, const FindHardest<double>&);

}  // namespace nf
