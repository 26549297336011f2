// Every op of the library, once. Kernels attach to these names from cpu/ and cuda/, fake kernels from
// normface_ext/ops.py; the test build of the CUDA kernels defines the same list in its own namespace.
//
// scale is a float, or a 0-d tensor on the device of x when `scale` is given (then scale_value is not
// read). Empty outputs (numel 0) stand for results that were not asked for.
#pragma once

#include <torch/csrc/stable/library.h>

#include "engine/cosine_arguments.h"
#include "engine/distance_arguments.h"
#include "engine/head_arguments.h"

namespace nf {

inline void define_metric_ops(torch::stable::detail::StableLibrary& m) {
  define<InnerDistanceArguments>(m);
  define<InnerDistanceBackwardArguments>(m);
  define<PairDistanceArguments>(m);
  define<PairDistanceBackwardArguments>(m);

  // The metric losses over agents, on all classes or on a shard of them (csrc/math/hinge.h). Labels lie in
  // [0, C); a row with ignore_index counts nowhere. `is_shard`: C may be 0, and a label of -1 (kElsewhere) has its agent
  // in another shard: every class here is a negative.
  //
  // cos(x_i, w_labels[i]) in float64, [N]; 0 where the agent is not here, so that shards add.
  m.def(
      "target_cosine(Tensor x, Tensor weight, Tensor labels, int ignore_index, float eps, bool is_shard)"
      " -> Tensor");
  // The sweep over the classes here, given the target cosines [N] of all. target [N] is the distance to
  // the label's agent, value [N] what the loss takes of the hinges, rows the state [kHingeFields, N]
  // (csrc/hinge_state.h), inverse_norm [C] that of the weight. classes [N, 1 + capacity] lists the label
  // and the first `capacity` active classes of every row, C where there is none; slopes, when
  // exponential, has their slopes. margin is a 0-d tensor, or margin_value.
  m.def(
      "agent_hinge(Tensor x, Tensor weight, Tensor labels, Tensor target_cosine, Tensor? margin,"
      " float margin_value, bool triplet, bool hardest, bool exponential, int ignore_index, float eps,"
      " int class_chunk, int capacity, bool is_shard) -> (Tensor target, Tensor value, Tensor rows,"
      " Tensor inverse_norm, Tensor classes, Tensor slopes)");
  // Gradients from d loss / d cosine: target_factor [N] of the label's, hinge_factor [N] times the slope
  // of every active class's. The scores are computed again. That of a shard, grad_x, is in the accumulator type,
  // and the shards' add up to that of all classes.
  m.def(
      "agent_hinge_backward(Tensor target_factor, Tensor hinge_factor, Tensor x, Tensor weight,"
      " Tensor labels, Tensor rows, Tensor inverse_norm, bool exponential, float eps, int class_chunk,"
      " bool is_shard, bool need_x, bool need_weight) -> (Tensor grad_x, Tensor grad_weight)");
  // Gradients of sum over i, k of factors[i, k] cos(x_i, w_classes[i, k]), from the saved inverse norms.
  // order sorts classes.flatten() stably; classes >= C are unused, and a row of nothing else gets zeros.
  // `is_shard` as above.
  m.def(
      "cosine_pairs_backward(Tensor factors, Tensor classes, Tensor order, Tensor x, Tensor weight,"
      " Tensor x_inverse, Tensor weight_inverse, float eps, bool is_shard, bool need_x, bool need_weight)"
      " -> (Tensor grad_x, Tensor grad_weight)");
}

inline void define_ops(torch::stable::detail::StableLibrary& m) {
  define_metric_ops(m);

  define<NormalizeArguments>(m);
  define<NormalizeBackwardArguments>(m);
  define<NormLinearArguments>(m);
  define<NormLinearBackwardArguments>(m);

  define<NormfaceSweepArguments>(m);
  define<NormfaceShiftArguments>(m);
  define<NormfaceFinishArguments>(m);
  define<NormfaceBackwardArguments>(m);
}

}  // namespace nf
