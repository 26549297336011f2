// Where the gradients of an op will be written.
#pragma once

#include "checks.h"
#include "cuda/products/cublas.h"

namespace nf {

// Of the shape [rows, D] of `t`, in zeros or uninitialised; empty where it was not asked for.
inline Tensor gradient_like(const Tensor& t, bool needed, bool zero) {
  if (!needed) return device_empty(t, {0}, t.scalar_type());
  return zero ? torch::stable::new_zeros(t, {t.size(0), t.size(1)}) : torch::stable::empty_like(t);
}

// The same for the features: a shard's part is added to others before it is rounded.
inline Tensor partial_gradient_like(const Tensor& x, bool needed, bool is_shard) {
  if (!needed || !is_shard) return gradient_like(x, needed, false);
  return device_empty(x, {x.size(0), x.size(1)}, accumulator(x.scalar_type()));
}

}  // namespace nf
