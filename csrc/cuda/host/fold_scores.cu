// Scores made by cuBLAS -> coefficients, one block for some kColumnsPerBlock columns of a row. A thread takes a
// class at a time.
#include <device/arrival.cuh>

#include "cuda/device/per_row.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/host/fold_scores.h"
#include "math/centers.h"

namespace nf {
namespace {

constexpr int64_t kColumnsPerBlock = 4096;

// Whole classes.
NF_HD int64_t columns_per_block(int64_t centers) {
  return centers < kColumnsPerBlock ? kColumnsPerBlock / centers * centers : centers;
}

// O is the type of the coefficients. kSeveral: a class has several centres. kLargest: the largest cosine as well.
// Blocks: rows x splits. Without a number of blocks the compiler spills for more of them than memory needs.
template <class T, class O, class Term, bool kSeveral, bool kLargest>
NF_KERNEL_RESIDENT(kThreads, (sizeof(T) == 8 ? 3 : 4))
fold_scores_kernel(FoldScores<T> task) {
  SharedMemory shared;
  double* scratch = shared.take<double>(SweepSums::kScratch * kThreads);
  const int64_t i = block_id(), split = block_y(), splits = block_count_y();
  const int64_t centers = kSeveral ? task.centers : 1, columns = columns_per_block(centers);
  const int64_t begin = split * columns, end = begin + columns < task.width ? begin + columns : task.width;
  const int64_t target = target_place(task.rows.labels[i], task.first, task.width);
  const Term term(task.rows.template at<T>(i), task.rows.numbers);
  O* e = static_cast<O*>(task.e);
  T value = 0, second = 0, largest = -T(INFINITY);
#pragma unroll(sizeof(T) == 8 ? 1 : 2)  // a term in float64 has no registers for more at a time
  for (int64_t j = begin + thread_id() * centers; j < end; j += kThreads * centers) {
    const T* scores = task.scores + i * task.stride + j;
    math::Winner<T> nearest{0, scores[0]};
    if (kSeveral) nearest = math::winner<T>(centers, [&](int64_t k) { return scores[k]; });
    math::Cell<T> cell = term.at(nearest.cosine, math::PlainExp());
    const bool is_target = target >= j && target < j + centers;
    if (is_target) cell = {};
    if (kLargest && !is_target) largest = math::larger(largest, nearest.cosine);
    if (e != nullptr)
      for (int64_t k = 0; k < centers; ++k)
        e[i * task.stride + j + k] = k == nearest.center ? O(cell.coefficient) : O(T(0));
    value += cell.value;
    second += cell.second;
  }
  if (task.sums.partial == nullptr) return;
  // One after another: each is out of its registers before the next.
  const double total = block_sum(double(value), scratch);
  if (thread_id() == 0) task.sums.value(split, i) = total;
  const double total_second = block_sum(double(second), scratch);
  if (thread_id() == 0) task.sums.second(split, splits, i) = total_second;
  if constexpr (kLargest) {
    const double best = block_largest(double(largest), scratch);
    if (thread_id() == 0) task.sums.largest_cosine(split, splits, i) = best;
  }
  if (last_to_arrive(task.sums.arrivals + i, unsigned(splits)))
    task.sums.template add<kLargest>(splits, i, i + 1, scratch);
}

}  // namespace

int64_t fold_splits(int64_t width, int64_t centers) {
  const int64_t columns = columns_per_block(centers);
  return (width + columns - 1) / columns;
}

template <class T>
void fold_scores(Queue& queue, const FoldScores<T>& task) {
  const auto run = [&]<class O>() {
    dispatch_term<T>(task.rows.term, [&]<class Term>() {
      launch("fold_scores", queue,
             task.centers > 1 ? (task.sums.largest ? fold_scores_kernel<T, O, Term, true, true>
                                                   : fold_scores_kernel<T, O, Term, true, false>)
                              : (task.sums.largest ? fold_scores_kernel<T, O, Term, false, true>
                                                   : fold_scores_kernel<T, O, Term, false, false>),
             Grid{task.batch, fold_splits(task.width, task.centers)}, kThreads,
             shared_bytes<double>(SweepSums::kScratch * kThreads), task);
    });
  };
  if constexpr (std::is_same_v<T, float>)
    if (task.e_is_bfloat16) return run.template operator()<BFloat16>();
  run.template operator()<T>();
}

template void fold_scores(Queue&, const FoldScores<float>&);
template void fold_scores(Queue&, const FoldScores<double>&);

}  // namespace nf
