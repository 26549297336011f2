// What becomes of one number of a weight's gradient g where it is not kept: a step of torch.optim.SGD, Adam or
// AdamW at once, on the weight w and the optimizer's states, or an addition to a gradient that is there already.
// V is a number or a vector of them, T the accumulator type; `root(v)` is the square root.
#pragma once

#include "math/host_device.h"

namespace nf::math {

enum Update : int { kAdd, kSgd, kAdam, kUpdates };

// The numbers of all rules. They are the host's, in double, and rounded once to T.
struct UpdateNumbers {
  double lr, weight_decay;
  double momentum, dampening;       // SGD
  double beta1, beta2, eps;         // Adam
  double correction1, correction2;  // 1 - beta^step
  bool maximize, nesterov;
  bool starts;     // SGD: the first step, before which there is no momentum
  bool decoupled;  // AdamW: the decay is of the weight itself
};

// state1 += g
template <class T>
struct Addition {
  static constexpr int kStates = 1;
  static constexpr bool kMovesWeight = false;
  explicit NF_HD Addition(const UpdateNumbers&) {}

  template <class V, class Root>
  NF_HD void operator()(V g, V&, V& gradient, V&, const Root&) const {
    gradient = gradient + g;
  }
};

// g' = +-g + decay w;  m = momentum m + (1 - dampening) g', at first g';  w -= lr (m, or g' + momentum m)
template <class T, bool kMomentum>
struct SgdStep {
  static constexpr int kStates = kMomentum ? 1 : 0;
  static constexpr bool kMovesWeight = true;
  T sign, lr, decay, momentum, undampened;
  bool nesterov, starts;

  explicit NF_HD SgdStep(const UpdateNumbers& n)
      : sign(n.maximize ? T(-1) : T(1)),
        lr(T(n.lr)),
        decay(T(n.weight_decay)),
        momentum(T(n.momentum)),
        undampened(T(1.0 - n.dampening)),
        nesterov(n.nesterov),
        starts(n.starts) {}

  template <class V, class Root>
  NF_HD void operator()(V g, V& w, V& m, V&, const Root&) const {
    g = g * sign + w * decay;
    if constexpr (kMomentum) {
      m = starts ? g : m * momentum + g * undampened;
      g = nesterov ? g + m * momentum : m;
    }
    w = w - g * lr;
  }
};

// m += (1 - beta1)(g' - m);  v = beta2 v + (1 - beta2) g'^2;  w -= lr / c1 * m / (sqrt(v / c2) + eps)
template <class T>
struct AdamStep {
  static constexpr int kStates = 2;
  static constexpr bool kMovesWeight = true;
  T sign, step, keep, decay, share1, beta2, share2, root2, eps;

  explicit NF_HD AdamStep(const UpdateNumbers& n)
      : sign(n.maximize ? T(-1) : T(1)),
        step(T(n.lr / n.correction1)),
        keep(n.decoupled ? T(1.0 - n.lr * n.weight_decay) : T(1)),
        decay(n.decoupled ? T(0) : T(n.weight_decay)),
        share1(T(1.0 - n.beta1)),
        beta2(T(n.beta2)),
        share2(T(1.0 - n.beta2)),
        root2(T(std::sqrt(n.correction2))),
        eps(T(n.eps)) {}

  template <class V, class Root>
  NF_HD void operator()(V g, V& w, V& m, V& v, const Root& root) const {
    w = w * keep;
    g = g * sign + w * decay;
    m = m + (g - m) * share1;
    v = v * beta2 + g * g * share2;
    w = w - m / (root(v) / root2 + eps) * step;
  }
};

// f.template operator()<Rule>() for the rule at hand.
template <class T, class F>
void dispatch_update(int64_t update, const UpdateNumbers& numbers, const F& f) {
  if (update == kAdd) return f.template operator()<Addition<T>>();
  if (update == kAdam) return f.template operator()<AdamStep<T>>();
  if (numbers.momentum != 0.0) return f.template operator()<SgdStep<T, true>>();
  return f.template operator()<SgdStep<T, false>>();
}

}  // namespace nf::math
