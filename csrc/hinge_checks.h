// Argument checks of the ops of the metric losses over agents, for CPU and CUDA.
#pragma once

#include "checks.h"
#include "engine/agent_arguments.h"
#include "hinge_state.h"

namespace nf {

inline void check_row_numbers(const char* op, const char* name, const Tensor& t, ScalarType type,
                              int64_t batch) {
  if (t.scalar_type() != type || t.dim() != 1 || t.size(0) != batch || !t.is_contiguous())
    fail(op, ": expected `", name, "` to be contiguous ", name_of(type), " of shape [", batch, "], got ",
         name_of(t.scalar_type()), " of shape ", shape_of(t));
}

template <class Arguments>
void check_agents(const Arguments& in) {
  check_head(in.kName, in.x, in.weight, in.is_shard ? 0 : 1);
  check_labels(in.kName, in.labels, in.x.size(0));
}

inline void check(const TargetCosineArguments& in) { check_agents(in); }

inline void check(const AgentHingeArguments& in) {
  check_agents(in);
  check_number(in.kName, "margin", in.margin, in.x);
  check_row_numbers(in.kName, "target_cosine", in.target_cosine, ScalarType::Double, in.x.size(0));
}

inline void check(const AgentHingeBackwardArguments& in) {
  const char* op = in.kName;
  check_agents(in);
  const ScalarType wide = accumulator(in.x.scalar_type());
  check_row_numbers(op, "target_factor", in.target_factor, wide, in.x.size(0));
  check_row_numbers(op, "hinge_factor", in.hinge_factor, wide, in.x.size(0));
  check_row_numbers(op, "inverse_norm", in.inverse_norm, wide, in.weight.size(0));
  check_shape(op, "rows", in.rows, kHingeFields, in.x.size(0));
}

inline void check(const CosinePairsBackwardArguments& in) {
  const char* op = in.kName;
  check_head(op, in.x, in.weight, in.is_shard ? 0 : 1);
  const ScalarType wide = accumulator(in.x.scalar_type());
  if (in.classes.dim() != 2) fail(op, ": expected `classes` to be 2-D, got shape ", shape_of(in.classes));
  check_shape(op, "classes", in.classes, in.x.size(0), in.classes.size(1));
  check_matrix(op, "factors", in.factors);
  check_shape(op, "factors", in.factors, in.x.size(0), in.classes.size(1));
  if (in.need_weight) check_row_numbers(op, "order", in.order, ScalarType::Long, in.classes.numel());
  check_row_numbers(op, "x_inverse", in.x_inverse, wide, in.x.size(0));
  check_row_numbers(op, "weight_inverse", in.weight_inverse, wide, in.weight.size(0));
}

}  // namespace nf
