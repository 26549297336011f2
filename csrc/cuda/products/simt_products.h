// Scores and dW in float32 or float64 without tensor cores, each product in one kernel with what follows it:
// for shapes so small that launches are what a step costs. Definition: simt_products.cu.
#pragma once

#include "cuda/device/class_gradient.cuh"
#include "cuda/device/row_state.cuh"
#include "cuda/device/term_rows.cuh"
#include "engine/tiles.h"

namespace nf {

// Rows must begin at multiples of 16 bytes; dW needs all columns in one block.
constexpr int64_t kMostPlainColumns = tiles::kSimtColumns;

template <class T>
struct PlainScores {
  const T* x_hat;  // [batch, dim]
  const T* w_hat;  // [width, dim]
  int64_t batch;
  int64_t dim;
  int64_t width;
  int64_t first;   // class of w_hat's row 0
  TermRows rows;   // of the softmax's term
  SweepSums sums;  // arrivals: one per block of rows
  T* e;            // [batch, stride]
  int64_t stride;  // a multiple of 8
};

template <class T>
int64_t plain_splits(int64_t width);
// E and its sums.
template <class T>
void plain_scores(Queue& queue, const PlainScores<T>& task);

template <class T>
struct PlainGradient {
  const T* e;  // [batch, stride], by plain_scores
  int64_t stride;
  int64_t columns;    // from a row's begin on, of these classes: a multiple of 8
  const T* weighted;  // [batch, dim]
  ClassGradient classes;
};

template <class T>
void plain_gradient(Queue& queue, const PlainGradient<T>& task);

}  // namespace nf
