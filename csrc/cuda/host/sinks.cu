// The active list and the hardest class of every row, from a chunk of coefficients or of scores in memory. One
// warp or block owns a row and takes its classes in order, so that nothing depends on who comes first.
#include "cuda/device/per_row.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/host/sinks.h"

namespace nf {
namespace {

// One warp per row; E is the type of the coefficients.
template <class T, class E>
NF_KERNEL(kThreads)
list_active_kernel(ListActive<T> task) {
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= task.rows.batch) return;  // the whole warp leaves
  const SinkChunk& chunk = task.chunk;
  const E* row = static_cast<const E*>(task.e) + i * chunk.stride;
  int64_t* listed = task.listed + i * task.capacity;
  T* found = task.found + i * task.capacity;
  int64_t place = chunk.begins() ? 0 : task.placed[i];
  const bool counts = task.rows.at(kRowWeight, i) != 0.0;
  for (int64_t base = 0; counts && base < chunk.width && place < task.capacity; base += kWarp) {
    const int64_t j = base + lane_id();
    const T e = j < chunk.width ? T(row[j]) : T(0);
    const unsigned active = warp_ballot(!(e == T(0)));
    const int64_t mine = place + count_bits(active & ((1u << lane_id()) - 1u));
    if (!(e == T(0)) && mine < task.capacity) {
      listed[mine] = chunk.first + j;
      found[mine] = e;
    }
    place += count_bits(active);
  }
  if (chunk.ends())
    for (int64_t k = place + lane_id(); k < task.capacity; k += kWarp) {
      listed[k] = chunk.classes;
      found[k] = T(0);
    }
  sync_warp();  // every lane's read of placed, before it changes
  if (lane_id() == 0) task.placed[i] = place;
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

// One block per row.
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
  for (int64_t k = thread_id(); counts && k < chunk.width; k += kThreads) {
    const Candidate<T> here{task.scores[i * chunk.stride + k], chunk.first + k};
    if (k != target && here.beats(best)) best = here;
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Candidate<T> other{shuffle_xor(best.cosine, mask), shuffle_xor(best.place, mask)};
    if (other.beats(best)) best = other;
  }
  if (lane_id() == 0) cosines[warp_id()] = best.cosine, places[warp_id()] = best.place;
  sync_block();  // the warps' best, before thread 0 compares them
  if (thread_id() != 0) return;
  for (int w = 1; w < kWarps; ++w) {
    const Candidate<T> other{cosines[w], places[w]};
    if (other.beats(best)) best = other;
  }
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
  const auto run = [&]<class E>() {
    launch("list_active", queue, list_active_kernel<T, E>, warp_per_row(task.rows.batch), kThreads, 0, task);
  };
  if constexpr (std::is_same_v<T, float>)
    if (task.e_is_bfloat16) return run.template operator()<BFloat16>();
  run.template operator()<T>();
}

template <class T>
void find_hardest(Queue& queue, const FindHardest<T>& task) {
  constexpr int kWarps = kThreads / kWarp;
  dispatch_term<T>(task.terms.term, [&]<class Term>() {
    launch("find_hardest", queue, find_hardest_kernel<T, Term>, Grid{task.rows.batch}, kThreads,
           shared_bytes<T>(kWarps) + shared_bytes<int64_t>(kWarps), task);
  });
}

template void list_active(Queue&, const ListActive<float>&);
template void list_active(Queue&, const ListActive<double>&);
template void find_hardest(Queue&, const FindHardest<float>&);
template void find_hardest(Queue&, const FindHardest<double>&);

}  // namespace nf
