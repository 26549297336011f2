// The arguments of inner_distance and pair_distance, for both devices (op.h). p = 2 is the squared distance
// sum (x - w)^2, p = 1 is sum |x - w|; the formulas are in csrc/math/distance.h. Gradients that were not asked
// for are empty.
#pragma once

#include "engine/op.h"

namespace nf {

// x [N, D], weight [C, D] -> [N, C] in x's dtype. near, when asked for, has for p = 2 a bit per cell, int32
// [N, ceil(C / 32)]: those whose products cancel, which backward computes from the differences too.
struct InnerDistanceArguments {
  static constexpr const char* kName = "inner_distance";
  static constexpr const char* kReturns = "(Tensor distances, Tensor near)";
  Tensor x, weight;
  bool need_near;
  int64_t p;

  template <class F>
  void each(F&& f) {
    f("x", x);
    f("weight", weight);
    f("need_near", need_near);
    f("p", p);
  }
};

// With labels [N] the gradient of the weight counts the cells (i, labels[i]) only.
struct InnerDistanceBackwardArguments {
  static constexpr const char* kName = "inner_distance_backward";
  static constexpr const char* kReturns = "(Tensor grad_x, Tensor grad_weight)";
  Tensor grad, near, x, weight;
  std::optional<Tensor> labels;
  bool need_x, need_weight;
  int64_t p;

  template <class F>
  void each(F&& f) {
    f("grad", grad);
    f("near", near);
    f("x", x);
    f("weight", weight);
    f("labels", labels);
    f("need_x", need_x);
    f("need_weight", need_weight);
    f("p", p);
  }
};

// a, b [N, D] -> [N], the same distances row by row, in the accumulator type.
struct PairDistanceArguments {
  static constexpr const char* kName = "pair_distance";
  static constexpr const char* kReturns = "Tensor";
  Tensor a, b;
  int64_t p;

  template <class F>
  void each(F&& f) {
    f("a", a);
    f("b", b);
    f("p", p);
  }
};

struct PairDistanceBackwardArguments {
  static constexpr const char* kName = "pair_distance_backward";
  static constexpr const char* kReturns = "(Tensor grad_a, Tensor grad_b)";
  Tensor grad, a, b;
  bool need_a, need_b;
  int64_t p;

  template <class F>
  void each(F&& f) {
    f("grad", grad);
    f("a", a);
    f("b", b);
    f("need_a", need_a);
    f("need_b", need_b);
    f("p", p);
  }
};

}  // namespace nf
