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

}  // namespace nf
