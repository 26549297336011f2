// The arguments of normalize and norm_linear, for both devices (op.h). What does not follow from shapes and
// types is said here; the formulas are in csrc/math/.
#pragma once

#include "engine/op.h"

namespace nf {

struct NormalizeOptions {
  int64_t dim;
  int64_t p;
  double eps;

  template <class F>
  void each(F&& f) {
    f("dim", dim);
    f("p", p);
    f("eps", eps);
  }
};

// x contiguous, or with `dim` innermost in memory (channels_last). norm keeps `dim` with size 1 and has the
// accumulator dtype.
struct NormalizeArguments : NormalizeOptions {
  static constexpr const char* kName = "normalize";
  static constexpr const char* kReturns = "(Tensor y, Tensor norm)";
  Tensor x;

  template <class F>
  void each(F&& f) {
    f("x", x);
    NormalizeOptions::each(f);
  }
};

struct NormalizeBackwardArguments : NormalizeOptions {
  static constexpr const char* kName = "normalize_backward";
  static constexpr const char* kReturns = "Tensor";
  std::optional<Tensor> grad_y, grad_norm;
  Tensor x, norm;

  template <class F>
  void each(F&& f) {
    f("grad_y", grad_y);
    f("grad_norm", grad_norm);
    f("x", x);
    f("norm", norm);
    NormalizeOptions::each(f);
  }
};

// The scale is a float, or a 0-d tensor on the device of x when `scale` is given: then scale_value is not read.
struct NormLinearOptions {
  double scale_value;
  bool normalize_input;
  double eps;

  template <class F>
  void each(F&& f) {
    f("scale_value", scale_value);
    f("normalize_input", normalize_input);
    f("eps", eps);
  }
};

// x [N, D], weight [C, D] -> s * cosine [N, C] in x's dtype
struct NormLinearArguments : NormLinearOptions {
  static constexpr const char* kName = "norm_linear";
  static constexpr const char* kReturns = "Tensor";
  Tensor x, weight;
  std::optional<Tensor> scale;

  template <class F>
  void each(F&& f) {
    f("x", x);
    f("weight", weight);
    f("scale", scale);
    NormLinearOptions::each(f);
  }
};

// grad [N, C]. Gradients that were not asked for are empty; that of the scale is float64.
struct NormLinearBackwardArguments : NormLinearOptions {
  static constexpr const char* kName = "norm_linear_backward";
  static constexpr const char* kReturns = "(Tensor grad_x, Tensor grad_weight, Tensor grad_scale)";
  Tensor grad, x, weight;
  std::optional<Tensor> scale;
  bool need_x, need_weight, need_scale;

  template <class F>
  void each(F&& f) {
    f("grad", grad);
    f("x", x);
    f("weight", weight);
    f("scale", scale);
    f("need_x", need_x);
    f("need_weight", need_weight);
    f("need_scale", need_scale);
    NormLinearOptions::each(f);
  }
};

}  // namespace nf
