// Scores made by cuBLAS -> coefficients, one block for kColumnsPerBlock columns of a row.
#include <device/arrival.cuh>

#include "cuda/device/per_row.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/host/fold_scores.h"

namespace nf {
namespace {

constexpr int64_t kColumnsPerBlock = 4096;

// O is the type of the coefficients. kLargest: the largest cosine as well. Blocks: rows x splits.
template <class T, class O, class Term, bool kLargest>
NF_KERNEL(kThreads)
fold_scores_kernel(FoldScores<T> task) {
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  const int64_t i = block_id(), split = block_y(), splits = block_count_y();
  const int64_t begin = split * kColumnsPerBlock;
  const int64_t end = begin + kColumnsPerBlock < task.width ? begin + kColumnsPerBlock : task.width;
  const int64_t target = target_place(task.rows.labels[i], task.first, task.width);
  const Term term(task.rows.template at<T>(i), task.rows.numbers);
  O* e = static_cast<O*>(task.e);
  T value = 0, second = 0, largest = -T(INFINITY);
  for (int64_t j = begin + thread_id(); j < end; j += kThreads) {
    const T cosine = task.scores[i * task.stride + j];
    math::Cell<T> cell = term.at(cosine, math::PlainExp());
    if (j == target) cell = {};
    if (kLargest && j != target) largest = math::larger(largest, cosine);
    if (e != nullptr) e[i * task.stride + j] = O(cell.coefficient);
    value += cell.value;
    second += cell.second;
  }
  if (task.sums.partial == nullptr) return;
  const double total = block_sum(double(value), scratch), total_second = block_sum(double(second), scratch);
  double best = 0;
  if constexpr (kLargest) best = block_largest(double(largest), scratch);
  if (thread_id() == 0) {
    task.sums.value(split, i) = total;
    task.sums.second(split, splits, i) = total_second;
    if constexpr (kLargest) task.sums.largest_cosine(split, splits, i) = best;
  }
  if (last_to_arrive(task.sums.arrivals + i, unsigned(splits)) && thread_id() == 0)
    task.sums.template add<kLargest>(splits, i);
}

}  // namespace

int64_t fold_splits(int64_t width) { return (width + kColumnsPerBlock - 1) / kColumnsPerBlock; }

template <class T>
void fold_scores(Queue& queue, const FoldScores<T>& task) {
  const auto run = [&]<class O>() {
    dispatch_term<T>(task.rows.term, [&]<class Term>() {
      launch("fold_scores", queue,
             task.sums.largest ? fold_scores_kernel<T, O, Term, true> : fold_scores_kernel<T, O, Term, false>,
             Grid{task.batch, fold_splits(task.width)}, kThreads, shared_bytes<double>(kThreads / kWarp),
             task);
    });
  };
  if constexpr (std::is_same_v<T, float>)
    if (task.e_is_bfloat16) return run.template operator()<BFloat16>();
  run.template operator()<T>();
}

template void fold_scores(Queue&, const FoldScores<float>&);
template void fold_scores(Queue&, const FoldScores<double>&);

}  // namespace nf
