// The arguments of the losses over agents, for both devices (op.h): on all classes, or on a shard of them.
// The formulas are in csrc/math/terms/hinge.h.
//
// x [N, D], weight [C, D], labels [N] int64 in [0, C); a row with ignore_index counts nowhere. `is_shard`: C
// may be 0, and a label of -1 (kElsewhere) has its agent in another shard: every class here is a negative.
#pragma once

#include "engine/op.h"

namespace nf {

struct AgentOperands {
  Tensor x, weight, labels;

  template <class F>
  void each(F&& f) {
    f("x", x);
    f("weight", weight);
    f("labels", labels);
  }
};

// cos(x_i, w_labels[i]) in float64, [N]; 0 where the agent is not here, so that shards add.
struct TargetCosineArguments : AgentOperands {
  static constexpr const char* kName = "target_cosine";
  static constexpr const char* kReturns = "Tensor";
  int64_t ignore_index;
  double eps;
  bool is_shard;

  template <class F>
  void each(F&& f) {
    AgentOperands::each(f);
    f("ignore_index", ignore_index);
    f("eps", eps);
    f("is_shard", is_shard);
  }
};

// The sweep over the classes here, given the target cosines [N] of all. target [N] is the distance to the
// label's agent, value [N] what the loss takes of the hinges, rows the state [kHingeFields, N]
// (hinge_state.h), inverse_norm [C] that of the weight. classes [N, 1 + capacity] lists the label and the
// first `capacity` active classes of every row, C where there is none; slopes, when exponential, has their
// slopes. margin is a 0-d tensor, or margin_value.
struct AgentHingeArguments : AgentOperands {
  static constexpr const char* kName = "agent_hinge";
  static constexpr const char* kReturns =
      "(Tensor target, Tensor value, Tensor rows, Tensor inverse_norm, Tensor classes, Tensor slopes)";
  Tensor target_cosine;
  std::optional<Tensor> margin;
  double margin_value;
  bool triplet, hardest, exponential;
  int64_t ignore_index;
  double eps;
  int64_t class_chunk, capacity;
  bool is_shard;

  template <class F>
  void each(F&& f) {
    AgentOperands::each(f);
    f("target_cosine", target_cosine);
    f("margin", margin);
    f("margin_value", margin_value);
    f("triplet", triplet);
    f("hardest", hardest);
    f("exponential", exponential);
    f("ignore_index", ignore_index);
    f("eps", eps);
    f("class_chunk", class_chunk);
    f("capacity", capacity);
    f("is_shard", is_shard);
  }
};

// Gradients from d loss / d cosine: target_factor [N] of the label's, hinge_factor [N] times the slope of
// every active class's. The scores are computed again. Of a shard grad_x is in the accumulator type, and the
// shards' add up to that of all classes.
struct AgentHingeBackwardArguments : AgentOperands {
  static constexpr const char* kName = "agent_hinge_backward";
  static constexpr const char* kReturns = "(Tensor grad_x, Tensor grad_weight)";
  Tensor target_factor, hinge_factor, rows, inverse_norm;
  bool need_x, need_weight;
  bool exponential;
  double eps;
  int64_t class_chunk;
  bool is_shard;

  template <class F>
  void each(F&& f) {
    AgentOperands::each(f);
    f("target_factor", target_factor);
    f("hinge_factor", hinge_factor);
    f("rows", rows);
    f("inverse_norm", inverse_norm);
    f("need_x", need_x);
    f("need_weight", need_weight);
    f("exponential", exponential);
    f("eps", eps);
    f("class_chunk", class_chunk);
    f("is_shard", is_shard);
  }
};

// Gradients of sum over i, k of factors[i, k] cos(x_i, w_classes[i, k]), from the saved inverse norms. order
// sorts classes.flatten() stably; classes >= C are unused, and a row of nothing else gets zeros.
struct CosinePairsBackwardArguments {
  static constexpr const char* kName = "cosine_pairs_backward";
  static constexpr const char* kReturns = "(Tensor grad_x, Tensor grad_weight)";
  Tensor x, weight;
  Tensor factors, classes, order;  // [N, listed], [N, listed], [N * listed]
  Tensor x_inverse, weight_inverse;
  bool need_x, need_weight;
  double eps;
  bool is_shard;

  template <class F>
  void each(F&& f) {
    f("x", x);
    f("weight", weight);
    f("factors", factors);
    f("classes", classes);
    f("order", order);
    f("x_inverse", x_inverse);
    f("weight_inverse", weight_inverse);
    f("need_x", need_x);
    f("need_weight", need_weight);
    f("eps", eps);
    f("is_shard", is_shard);
  }
};

}  // namespace nf
