// Every op of the library, once. Kernels attach to these names from cpu/ and cuda/, fake kernels from
// normface_ext/ops.py; the test build of the CUDA kernels defines the same list in its own namespace.
//
// scale is a float, or a 0-d tensor on the device of x when `scale` is given (then scale_value is not
// read). Empty outputs (numel 0) stand for results that were not asked for.
#pragma once

#include <torch/csrc/stable/library.h>

namespace nf {

inline void define_ops(torch::stable::detail::StableLibrary& m) {
  // x contiguous, or with `dim` innermost in memory (channels_last). norm keeps `dim` with size 1 and
  // has the accumulator dtype.
  m.def("normalize(Tensor x, int dim, int p, float eps) -> (Tensor y, Tensor norm)");
  m.def(
      "normalize_backward(Tensor? grad_y, Tensor? grad_norm, Tensor x, Tensor norm, int dim, int p,"
      " float eps) -> Tensor");

  // x [N, D], weight [C, D] -> scale * cosine [N, C]
  m.def(
      "norm_linear(Tensor x, Tensor weight, Tensor? scale, float scale_value, bool normalize_input,"
      " float eps) -> Tensor");
  m.def(
      "norm_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? scale, float scale_value,"
      " bool normalize_input, float eps, bool need_x, bool need_weight, bool need_scale)"
      " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_scale)");

  // x [N, D], weight [C, D], labels [N] int64; sample_weight [N] and class_weight [C] in the accumulator
  // dtype. class_sum [D] = sum over all classes of class_weight_j w_hat_j, where label smoothing needs it. rows is the per-row state [kRowFields, N] in float64
  // (csrc/row_state.h), inverse_norm [C] that of the weight, x_sum [N, D] = sum over the other classes
  // of E_j w_j, stored the E of every tile when `store`.
  m.def(
      "normface_loss(Tensor x, Tensor weight, Tensor labels, Tensor? scale, float scale_value,"
      " float m1, float m2, float m3, int reduction, int ignore_index, float eps, int class_chunk,"
      " bool store, bool need_x, int score_kernel, ScalarType operand, Tensor? sample_weight,"
      " Tensor? class_weight, float smoothing) -> (Tensor loss, Tensor rows, Tensor inverse_norm,"
      " Tensor x_sum, Tensor class_sum, Tensor stored)");
  m.def(
      "normface_loss_backward(Tensor grad_loss, Tensor x, Tensor weight, Tensor labels,"
      " Tensor? scale, float scale_value, float eps, int class_chunk, Tensor rows, Tensor inverse_norm,"
      " Tensor x_sum, Tensor class_sum, Tensor stored, bool need_x, bool need_weight, bool need_scale,"
      " int score_kernel, ScalarType operand, Tensor? class_weight, float smoothing)"
      " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_scale)");
}

}  // namespace nf
