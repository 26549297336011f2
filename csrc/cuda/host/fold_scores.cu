// Scores made by cuBLAS -> coefficients, one block for kColumnsPerBlock columns of a row.
#include <device/arrival.cuh>

#include "cuda/device/per_row.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/host/fold_scores.h"

namespace nf {
namespace {

constexpr int64_t kColumnsPerBlock = 4096;

// O is the type of the coefficients. Blocks: rows x splits.
template <class T, class O, class Term>
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
  T value = 0, second = 0;
  for (int64_t j = begin + thread_id(); j < end; j += kThreads) {
    math::Cell<T> cell = term.at(task.scores[i * task.stride + j], math::PlainExp());
    if (j == target) cell = {};
    if (e != nullptr) e[i * task.stride + j] = O(cell.coefficient);
    value += cell.value;
    second += cell.second;
  }
  if (task.sums.partial == nullptr) return;
  const double total = block_sum(double(value), scratch), total_second = block_sum(double(second), scratch);
  if (thread_id() == 0) {
    task.sums.value(split, i) = total;
    task.sums.second(split, splits, i) = total_second;
  }
  if (last_to_arrive(task.sums.arrivals + i, unsigned(splits)) && thread_id() == 0) task.sums.add(splits, i);
}

}  // namespace

int64_t fold_splits(int64_t width) { return (width + kColumnsPerBlock - 1) / kColumnsPerBlock; }

template <class T>
void fold_scores(Queue& queue, const FoldScores<T>& task) {
  const auto run = [&]<class O>() {
    dispatch_term<T>(task.rows.term, [&]<class Term>() {
      launch("fold_scores", queue, fold_scores_kernel<T, O, Term>, Grid{task.batch, fold_splits(task.width)},
             kThreads, shared_bytes<double>(kThreads / kWarp), task);
    });
  };
  if constexpr (std::is_same_v<T, float>)
    if (task.e_is_bfloat16) return run.template operator()<BFloat16>();
  run.template operator()<T>();
}

template void fold_scores(Queue&, const FoldScores<float>&);
template void fold_scores(Queue&, const FoldScores<double>&);

}  // namespace nf
