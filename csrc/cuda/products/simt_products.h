// Scores and dW in float32 or float64 without tensor cores, each product in one kernel with what follows it:
// for shapes so small that launches are what a step costs. Definition: simt_products.cu.
#pragma once

#include "cuda/device/class_gradient.cuh"
#include "cuda/device/row_state.cuh"
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
  int64_t first;  // class of w_hat's row 0
  const int64_t* labels;
  RowNumbers scale;
  const double* shift;  // [batch]
  RowState rows;        // with partial
  T* e;                 // [batch, stride]
  int64_t stride;       // a multiple of 8
  double* partial;      // [2, splits, batch] or null: then S and A are not wanted
  unsigned* arrivals;   // [one per row block], all 0; with partial
};

template <class T>
int64_t plain_splits(int64_t width);
// E; with `partial`, S and A added to rows.
template <class T>
void plain_scores(Queue& queue, const PlainScores<T>& task);

template <class T>
struct PlainGradient {
  const T* e;  // [batch, stride], by plain_scores
  int64_t stride;
  const T* weighted;  // [batch, dim]
  ClassGradient classes;
};

template <class T>
void plain_gradient(Queue& queue, const PlainGradient<T>& task);

}  // namespace nf
