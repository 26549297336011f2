// Every op of the library, once. Kernels attach to these names from cpu/ and cuda/, fake kernels from
// normface_ext/ops.py; the test build of the CUDA kernels defines the same list in its own namespace.
//
// scale is a float, or a 0-d tensor on the device of x when `scale` is given (then scale_value is not
// read). Empty outputs (numel 0) stand for results that were not asked for.
#pragma once

#include <torch/csrc/stable/library.h>

#include "engine/cosine_arguments.h"
#include "engine/distance_arguments.h"

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

  // The fused softmax head over all classes, or over one shard of `total_classes` (`is_shard`): then a
  // label is the place in this shard, or -1 where the target is elsewhere, and weight may be empty.
  // x [N, D], weight [C, D], labels [N] int64; sample_weight [N] and class_weight [C] in the accumulator
  // dtype; shift [N] float64 is the kappa to use instead of the one that normface_shift would find. rows is the per-row state [kRowFields, N] in float64 (csrc/row_state.h),
  // inverse_norm [C] that of the weight, x_sum [N, D] = sum over the other classes of E_j w_hat_j,
  // class_sum [D + 1] = sum of class_weight_j w_hat_j and of class_weight_j, which label smoothing needs,
  // stored the E of every tile when `store`.
  m.def(
      "normface_sweep(Tensor x, Tensor weight, Tensor labels, Tensor? scale, float scale_value,"
      " int ignore_index, float eps, int class_chunk, bool store, bool need_x, bool need_class_sum,"
      " int kernels, ScalarType product_precision, Tensor? sample_weight, Tensor? class_weight,"
      " int total_classes, bool is_shard, Tensor? shift) -> (Tensor rows, Tensor inverse_norm,"
      " Tensor x_sum, Tensor class_sum, Tensor stored)");
  // kappa [N] as these classes alone would have it: one constant where that serves, else the row's largest
  // logit among the classes other than its label, -inf where there is none. The largest over shards is
  // the `shift` of all.
  m.def(
      "normface_shift(Tensor x, Tensor weight, Tensor labels, Tensor? scale, float scale_value,"
      " int ignore_index, float eps, int class_chunk, int kernels, ScalarType product_precision,"
      " int total_classes, bool is_shard) -> Tensor");
  // Margin, weights and losses of the rows, from sums over all classes; rows with every field filled.
  m.def(
      "normface_finish(Tensor rows, Tensor x, Tensor class_sum, Tensor? scale, float scale_value, float m1,"
      " float m2, float m3, int reduction, float smoothing, int total_classes, float eps)"
      " -> (Tensor loss, Tensor rows)");
  // x_sum and class_sum are this shard's. Of a shard grad_x is in the accumulator type: the
  // gradients of the shards are to be added.
  m.def(
      "normface_backward(Tensor grad_loss, Tensor x, Tensor weight, Tensor labels,"
      " Tensor? scale, float scale_value, float eps, int class_chunk, Tensor rows, Tensor inverse_norm,"
      " Tensor x_sum, Tensor class_sum, Tensor stored, bool need_x, bool need_weight, bool need_scale,"
      " int kernels, ScalarType product_precision, Tensor? class_weight, float smoothing, int total_classes,"
      " bool is_shard) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_scale)");
}

}  // namespace nf
