// dW as sm80_weight_gradient.h makes it, by wgmma (compute capability 9.0). Definition: sm90_weight_gradient.cu.
#pragma once

#include "cuda/products/sm80_weight_gradient.h"

namespace nf {

// Bulk copies have no empty matrix, and begin at multiples of 16 bytes; what else there is, sm80_weight_gradient.cu
// takes.
inline bool takes_sm90_weight_gradient(const WeightGradient& task) {
  return task.classes.batch > 0 && task.classes.vectors;
}

void sm90_weight_gradient(Queue& queue, const WeightGradient& task);

}  // namespace nf
