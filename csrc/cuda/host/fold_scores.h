// Scores that lie in memory -> coefficients, for any term. Definition: fold_scores.cu.
#pragma once

#include <device/launch.cuh>

#include "cuda/device/row_state.cuh"
#include "cuda/device/term_rows.cuh"

namespace nf {

template <class T>
struct FoldScores {
  const T* scores;  // [N, stride], `width` of them valid
  int64_t batch;
  int64_t width;
  int64_t stride;
  int64_t first;    // class of column 0
  int64_t centers;  // columns of a class, of which the largest score counts; all here, or none
  TermRows rows;
  SweepSums sums;
  void* e;             // [N, stride], perhaps the same memory, or null: only the sums
  bool e_is_bfloat16;  // else T
};

int64_t fold_splits(int64_t width, int64_t centers);

// The target's coefficient is 0: its term is added apart, in double and with its margin. So are those of centres
// that are not the nearest of their class.
template <class T>
void fold_scores(Queue& queue, const FoldScores<T>& task);

}  // namespace nf
