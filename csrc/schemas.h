// Every op of the library, once. Kernels attach to these names from cpu/ and cuda/, fake kernels from
// normface_ext/ops.py; the test build of the CUDA kernels defines the same list in its own namespace.
//
// scale is a float, or a 0-d tensor on the device of x when `scale` is given (then scale_value is not
// read). Empty outputs (numel 0) stand for results that were not asked for.
#pragma once

#include <torch/csrc/stable/library.h>

#include "engine/agent_arguments.h"
#include "engine/cosine_arguments.h"

namespace nf {

inline void define_metric_ops(torch::stable::detail::StableLibrary& m) {
  // x [N, D], weight [C, D] -> [N, C] in x's dtype: sum (x - w)^2 for p = 2, sum |x - w| for p = 1. near,
  // when asked for, has for p = 2 a bit per cell, int32 [N, ceil(C / 32)]: those whose products cancel
  // (csrc/math/distance.h), which backward computes from the differences too.
  // With labels [N] the gradient of the weight counts the cells (i, labels[i]) only.
  m.def("inner_distance(Tensor x, Tensor weight, int p, bool need_near) -> (Tensor distances, Tensor near)");
  m.def(
      "inner_distance_backward(Tensor grad, Tensor near, Tensor x, Tensor weight, Tensor? labels, int p,"
      " bool need_x, bool need_weight) -> (Tensor grad_x, Tensor grad_weight)");

  // a, b [N, D] -> [N], the same distances row by row, in the accumulator type.
  m.def("pair_distance(Tensor a, Tensor b, int p) -> Tensor");
  m.def(
      "pair_distance_backward(Tensor grad, Tensor a, Tensor b, int p, bool need_a, bool need_b)"
      " -> (Tensor grad_a, Tensor grad_b)");

  define<TargetCosineArguments>(m);
  define<AgentHingeArguments>(m);
  define<AgentHingeBackwardArguments>(m);
  define<CosinePairsBackwardArguments>(m);
}

inline void define_ops(torch::stable::detail::StableLibrary& m) {
  define_metric_ops(m);

  define<NormalizeArguments>(m);
  define<NormalizeBackwardArguments>(m);

  // x [N, D], weight [C, D] -> scale * cosine [N, C]
  m.def(
      "norm_linear(Tensor x, Tensor weight, Tensor? scale, float scale_value, bool normalize_input,"
      " float eps) -> Tensor");
  m.def(
      "norm_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? scale, float scale_value,"
      " bool normalize_input, float eps, bool need_x, bool need_weight, bool need_scale)"
      " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_scale)");

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
