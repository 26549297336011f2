// The arguments of head_backward_update: the weight's part of head_backward, where dW is not kept. Each row of it
// goes, as soon as it is made and as dW would have held it, into a rule of math/update.h:
//   add   state1, the gradient so far, [C, D] like weight
//   sgd   weight and, with momentum, state1
//   adam  weight, state1 (exp_avg) and state2 (exp_avg_sq)
// A row of weight is written when nothing reads it any more: its tile is done. Of what head_backward makes besides,
// the gradients of x read other rows of weight, so that op has to be called before.
#pragma once

#include "engine/head_arguments.h"
#include "math/update.h"

namespace nf {

constexpr const char* kUpdateNames[math::kUpdates] = {"add", "sgd", "adam"};

struct HeadUpdateArguments : HeadBackwardTensors {
  static constexpr const char* kName = "head_backward_update";
  static constexpr const char* kReturns = "()";
  static constexpr const char* kWritten[] = {"weight", "state1", "state2"};
  std::optional<Tensor> state1, state2;
  int64_t update;  // math::Update
  math::UpdateNumbers by;

  template <class F>
  void each(F&& f) {
    HeadBackwardTensors::each(f);
    f("state1", state1);
    f("state2", state2);
    f("update", update);
    f("lr", by.lr);
    f("weight_decay", by.weight_decay);
    f("momentum", by.momentum);
    f("dampening", by.dampening);
    f("beta1", by.beta1);
    f("beta2", by.beta2);
    f("adam_eps", by.eps);
    f("correction1", by.correction1);
    f("correction2", by.correction2);
    f("maximize", by.maximize);
    f("nesterov", by.nesterov);
    f("starts", by.starts);
    f("decoupled", by.decoupled);
    SweepOptions::each(f);
  }
};

inline void check_update(const HeadUpdateArguments& in) {
  check_backward(in.kName, in);
  if (in.update < 0 || in.update >= math::kUpdates)
    fail(in.kName, ": expected `update` in [0, ", int(math::kUpdates), "), got ", in.update);
  const Tensor& w = in.weight;
  const auto given = [&](const char* name, const std::optional<Tensor>& t, bool wanted) {
    if (wanted != t.has_value())
      fail(in.kName, ": expected ", wanted ? "" : "no ", "`", name, "` with the update ",
           kUpdateNames[in.update], ", got ", wanted ? "none" : "one");
    if (!wanted) return;
    check_exact(in.kName, name, *t, w.scalar_type(), {w.size(0), w.size(1)});
    if (t->device().type() != w.device().type() || t->get_device_index() != w.get_device_index())
      fail(in.kName, ": expected `", name, "` on the device of `weight`, got it on another");
  };
  math::dispatch_update<float>(in.update, in.by, [&]<class Rule>() {
    given("state1", in.state1, Rule::kStates > 0);
    given("state2", in.state2, Rule::kStates > 1);
  });
}

}  // namespace nf
