// What the kernels of scores on tensor cores are told: what the term makes of x_hat w_hat^T leaves them, and the scores
// themselves never reach memory.
#pragma once

#include <device/launch.cuh>

#include "cuda/device/row_state.cuh"
#include "cuda/device/term_rows.cuh"
#include "math/softmax.h"

namespace nf {

template <class Operand, class Coefficient>
struct ScoreTaskOf {
  using Factor = Operand;
  using Stored = Coefficient;

  const Operand* x_hat;  // [batch, dim]
  const Operand* w_hat;  // [width, dim]
  int64_t batch;
  int64_t dim;  // so that rows begin at multiples of 16 bytes
  int64_t width;
  int64_t first;  // class of w_hat's row 0
  math::FixedShift window;
  TermRows rows;
  SweepSums sums;  // arrivals: one per block of rows
  Coefficient* e;  // [batch, stride] or null: only the sums
  int64_t stride;  // a multiple of 8
  float* largest;  // [splits, batch], for the pass that finds the largest logits
};

// What is kept of every row in a block's shared memory, beside its target's place. At 256 columns the two blocks of
// sm80_scores.cu have room for one number, which serves the softmax with one scale and the hinges.
template <class Term>
constexpr int numbers_per_row(bool scale_per_row) {
  return int(Term::kSoftmax) + int(Term::kThreshold) + int(scale_per_row);
}

using ScoreTask = ScoreTaskOf<Half, BFloat16>;  // sm80_scores.cu, sm90_scores.cu
using Tf32Scores = ScoreTaskOf<float, float>;   // sm80_tf32x3_scores.cu

}  // namespace nf
