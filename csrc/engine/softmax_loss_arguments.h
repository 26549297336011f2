// The arguments of softmax_loss and of its backward, for both devices (op.h): those of head_sweep, softmax_finish and
// head_backward (head_arguments.h), which they are in one. What forward leaves for backward lies in `saved`, one
// tensor: softmax_loss.h says how.
#pragma once

#include "engine/head_arguments.h"

namespace nf {

// What of a step lies in `saved`.
struct SavedParts {
  bool store;           // E
  bool keep_x;          // x_sum
  bool need_class_sum;  // with label smoothing
  bool need_margin;     // the slopes along the margin

  template <class F>
  void each(F&& f) {
    f("store", store);
    f("keep_x", keep_x);
    f("need_class_sum", need_class_sum);
    f("need_margin", need_margin);
  }
};

// loss [N] or []; saved [bytes / 8] float64: see Saved.
struct SoftmaxLossArguments : HeadInputs, LossOptions {
  static constexpr const char* kName = "softmax_loss";
  static constexpr const char* kReturns = "(Tensor loss, Tensor saved)";
  std::optional<Tensor> m1, m2, m3, sample_weight;
  SavedParts parts;
  bool need_largest;
  int64_t ignore_index;

  template <class F>
  void each(F&& f) {
    each_input(f);
    f("m1", m1);
    f("m2", m2);
    f("m3", m3);
    f("sample_weight", sample_weight);
    f("class_weight", class_weight);
    parts.each(f);
    f("need_largest", need_largest);
    f("ignore_index", ignore_index);
    LossOptions::each(f);
    SweepOptions::each(f);
  }
};

// As head_backward's; the parts are those of the forward.
struct SoftmaxLossBackwardArguments : HeadInputs {
  static constexpr const char* kName = "softmax_loss_backward";
  static constexpr const char* kReturns = "(Tensor grad_x, Tensor grad_weight, Tensor grad_scale)";
  Tensor grad_loss, saved;
  SavedParts parts;
  bool need_x, need_weight, need_scale;

  template <class F>
  void each(F&& f) {
    f("grad_loss", grad_loss);
    f("saved", saved);
    each_input(f);
    f("class_weight", class_weight);
    parts.each(f);
    f("need_x", need_x);
    f("need_weight", need_weight);
    f("need_scale", need_scale);
    SweepOptions::each(f);
  }
};

}  // namespace nf
