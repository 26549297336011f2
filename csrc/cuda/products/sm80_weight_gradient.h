// dW by our own tensor-core kernel: E^T times the weighted features, with everything that follows the
// product done in registers, so that dW is written once and in its final type. Definition:
// sm80_weight_gradient.cu.
#pragma once

#include "cuda/device/class_gradient.cuh"
#include "engine/tiles.h"

namespace nf {

struct WeightGradient {
  const BFloat16* e;         // [batch, stride], stored by sm80_scores.cu
  int64_t stride;            // a multiple of 8
  int64_t columns;           // from a row's begin on, of these classes: a multiple of 8
  const BFloat16* weighted;  // [batch, dim], dim a multiple of 8 and at most kMostColumns
  ClassGradient classes;
};

// A block owns all columns of its classes, since the radial part is a sum over them.
constexpr int64_t kMostColumns = tiles::kSm80GradientColumns;

void weight_gradient(Queue& queue, const WeightGradient& task);

}  // namespace nf
