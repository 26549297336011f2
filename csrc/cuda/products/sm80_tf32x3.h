// The products of float32 operands on tensor cores, as exact as float32's own (device/tf32x3.cuh); scores and dW in one
// kernel with what follows them. Definitions: sm80_tf32x3_scores.cu, sm80_tf32x3_sums.cu, sm80_tf32x3_gradient.cu.
#pragma once

#include "cuda/device/class_gradient.cuh"
#include "cuda/products/score_task.h"

namespace nf {

// Blocks along the classes, each with its own partial sums.
int64_t tf32_score_splits(const Queue& queue, int64_t batch, int64_t width);

// As score_largest and score_fold (sm80_scores.h).
void tf32_score_largest(Queue& queue, const Tf32Scores& task);
void tf32_score_fold(Queue& queue, const Tf32Scores& task);

struct Tf32Sums {
  const float* e;  // [batch, stride], by tf32_score_fold
  int64_t stride;
  int64_t columns;     // from a row's begin on, of these classes: a multiple of 8
  const float* w_hat;  // [width, dim], dim a multiple of 4
  int64_t batch;
  int64_t dim;
  int64_t width;
  float* partial;  // [splits, batch, dim]
  float* x_sum;    // [batch, dim]
  bool add;        // to what is there
};

// Stretches of classes, each with its own partial sums.
int64_t tf32_sum_splits(const Queue& queue, int64_t batch, int64_t dim, int64_t width);

// x_sum = E w_hat.
void tf32_sums(Queue& queue, const Tf32Sums& task);

struct Tf32Gradient {
  const float* e;  // [batch, stride], by tf32_score_fold
  int64_t stride;
  int64_t columns;        // from a row's begin on, of these classes: a multiple of 8
  const float* weighted;  // [batch, dim], times `powers`
  const float* powers;    // [batch], powers of two; then zeros up to a multiple of 4
  ClassGradient classes;  // dim a multiple of 4 and at most tiles::kTf32GradientColumns
};

void tf32_gradient(Queue& queue, const Tf32Gradient& task);

}  // namespace nf
