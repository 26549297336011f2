// Argument checks of the ops of the metric losses over agents, for CPU and CUDA.
#pragma once

#include "checks.h"
#include "hinge_state.h"

namespace nf {

inline void check_row_numbers(const char* op, const char* name, const Tensor& t, ScalarType type,
                              int64_t batch) {
  if (t.scalar_type() != type || t.dim() != 1 || t.size(0) != batch || !t.is_contiguous())
    fail(op, ": expected `", name, "` to be contiguous ", name_of(type), " of shape [", batch, "], got ",
         name_of(t.scalar_type()), " of shape ", shape_of(t));
}

inline void check_agents(const char* op, const Tensor& x, const Tensor& weight, const Tensor& labels,
                         bool is_shard) {
  check_head(op, x, weight, is_shard ? 0 : 1);
  check_labels(op, labels, x.size(0));
}

inline void check_hinge_backward(const char* op, const Tensor& target_factor, const Tensor& hinge_factor,
                                 const Tensor& x, const Tensor& weight, const Tensor& labels,
                                 const Tensor& rows, const Tensor& inverse_norm, bool is_shard) {
  check_agents(op, x, weight, labels, is_shard);
  const ScalarType wide = accumulator(x.scalar_type());
  check_row_numbers(op, "target_factor", target_factor, wide, x.size(0));
  check_row_numbers(op, "hinge_factor", hinge_factor, wide, x.size(0));
  check_row_numbers(op, "inverse_norm", inverse_norm, wide, weight.size(0));
  check_shape(op, "rows", rows, kHingeFields, x.size(0));
}

inline void check_cosine_pairs(const char* op, const Tensor& factors, const Tensor& classes,
                               const Tensor& order, const Tensor& x, const Tensor& weight,
                               const Tensor& x_inverse, const Tensor& weight_inverse, bool need_weight,
                               bool is_shard) {
  check_head(op, x, weight, is_shard ? 0 : 1);
  const ScalarType wide = accumulator(x.scalar_type());
  if (classes.dim() != 2) fail(op, ": expected `classes` to be 2-D, got shape ", shape_of(classes));
  check_shape(op, "classes", classes, x.size(0), classes.size(1));
  check_matrix(op, "factors", factors);
  check_shape(op, "factors", factors, x.size(0), classes.size(1));
  if (need_weight) check_row_numbers(op, "order", order, ScalarType::Long, classes.numel());
  check_row_numbers(op, "x_inverse", x_inverse, wide, x.size(0));
  check_row_numbers(op, "weight_inverse", weight_inverse, wide, weight.size(0));
}

}  // namespace nf
