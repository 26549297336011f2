// Argument checks of the ops of the metric losses over agents, for CPU and CUDA.
#pragma once

#include "checks.h"
#include "engine/agent_arguments.h"
#include "engine/hinge_state.h"

namespace nf {

template <class Arguments>
void check_agents(const Arguments& in) {
  check_head(in.kName, in.x, in.weight, in.is_shard ? 0 : 1);
  check_labels(in.kName, in.labels, in.x.size(0));
}

inline void check(const TargetCosineArguments& in) { check_agents(in); }

inline void check(const AgentHingeArguments& in) {
  check_agents(in);
  check_number(in.kName, "margin", in.margin, in.x);
  check_exact(in.kName, "target_cosine", in.target_cosine, ScalarType::Double, {in.x.size(0)});
}

inline void check(const AgentHingeBackwardArguments& in) {
  const char* op = in.kName;
  check_agents(in);
  const ScalarType wide = accumulator(in.x.scalar_type());
  check_exact(op, "target_factor", in.target_factor, wide, {in.x.size(0)});
  check_exact(op, "hinge_factor", in.hinge_factor, wide, {in.x.size(0)});
  check_exact(op, "inverse_norm", in.inverse_norm, wide, {in.weight.size(0)});
  check_exact(op, "rows", in.rows, ScalarType::Double, {kHingeFields, in.x.size(0)});
}

inline void check(const CosinePairsBackwardArguments& in) {
  const char* op = in.kName;
  check_head(op, in.x, in.weight, in.is_shard ? 0 : 1);
  const ScalarType wide = accumulator(in.x.scalar_type());
  if (in.classes.dim() != 2) fail(op, ": expected `classes` to be 2-D, got shape ", shape_of(in.classes));
  check_exact(op, "classes", in.classes, ScalarType::Long, {in.x.size(0), in.classes.size(1)});
  check_exact(op, "factors", in.factors, wide, {in.x.size(0), in.classes.size(1)});
  if (in.need_weight) check_exact(op, "order", in.order, ScalarType::Long, {in.classes.numel()});
  check_exact(op, "x_inverse", in.x_inverse, wide, {in.x.size(0)});
  check_exact(op, "weight_inverse", in.weight_inverse, wide, {in.weight.size(0)});
}

}  // namespace nf
