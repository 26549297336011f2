// The arguments of the engine's ops, for both devices (op.h): softmax heads and losses over agents. The formulas
// are in math/terms, math/softmax.h and math/margins, the fields of `rows` and `slopes` in row_state.h.
//
// A sweep is over all classes, or over one shard of `total_classes` (`is_shard`): then a label is the place
// in this shard, or -1 where the target is elsewhere, and weight may be empty. x [N, D], weight [C, D],
// labels [N] int64; sample_weight [N] and class_weight [C] in the accumulator dtype. The scale, m1, m2 and m3
// are floats, or floating tensors [] or [N] on the device of x, which stand for the `..._value` then.
// threshold [N] and numbers [kNumbers], float64, are what the `term` (terms.h) wants of them.
//
// A class may have several `centers`: then weight is [C centers, D], the rows of class j being j centers + k, and a
// label is a row of it, the one that target_center finds. No row of the label's class is a cell; of any other class
// the one nearest to x_i is (math/centers.h), and the coefficients of the others are 0. "Classes" below are rows
// of weight, but for total_classes.
// Empty outputs (numel 0) are results that were not asked for.
#pragma once

#include <cmath>

#include "engine/block.h"
#include "engine/op.h"
#include "engine/row_state.h"
#include "engine/terms.h"

namespace nf {

struct HeadOptions {
  double scale_value;
  double eps;
  int64_t total_classes;

  template <class F>
  void each(F&& f) {
    f("scale_value", scale_value);
    f("eps", eps);
    f("total_classes", total_classes);
  }
};

// How the products over the classes are made, and what becomes of a cell.
struct SweepOptions : HeadOptions {
  int64_t term;            // Term
  double lowest, highest;  // range of what the term makes of a cosine, for the shift
  int64_t centers;         // of a class
  int64_t workspace;       // bytes beyond inputs and gradients
  std::string product;     // "auto", or a name of products.h
  ScalarType product_precision;
  bool is_shard;

  template <class F>
  void each(F&& f) {
    HeadOptions::each(f);
    f("term", term);
    f("lowest", lowest);
    f("highest", highest);
    f("centers", centers);
    f("workspace", workspace);
    f("product", product);
    f("product_precision", product_precision);
    f("is_shard", is_shard);
  }
};

// What the ops that go over the classes share.
struct HeadInputs : SweepOptions {
  Tensor x, weight, labels;
  std::optional<Tensor> scale, threshold, numbers, class_weight;

  // What every one of them begins with; where the class weights stand is the op's.
  template <class F>
  void each_input(F&& f) {
    f("x", x);
    f("weight", weight);
    f("labels", labels);
    f("scale", scale);
    f("threshold", threshold);
    f("numbers", numbers);
  }
};

// rows [kRowFields, N] float64, inverse_norm [C] that of the weight, x_sum [N, D] = sum over the other classes
// of e_j w_hat_j, class_sum [D + 1] = sum of class_weight_j w_hat_j and of class_weight_j, which label
// smoothing needs, stored the coefficients e of every tile when `store`. `need_largest` fills kLargestCosine of
// the rows that count, -inf where there is no other class. shift [N] float64 is the kappa to use instead of the
// one that head_shift would find. listed [N, capacity] are the classes that the `sink` (terms.h) collects, C
// where there is none; found [N, capacity] their coefficients, 0 beside a C, or the cosine of the hardest, -inf
// where there is no other class; then a row's sums are what the term makes of that one cell.
struct HeadSweepArguments : HeadInputs {
  static constexpr const char* kName = "head_sweep";
  static constexpr const char* kReturns =
      "(Tensor rows, Tensor inverse_norm, Tensor x_sum, Tensor class_sum, Tensor stored, Tensor listed, "
      "Tensor found)";
  std::optional<Tensor> sample_weight, shift;
  bool store, need_x, need_class_sum, need_largest;
  int64_t sink, capacity;
  int64_t ignore_index;

  template <class F>
  void each(F&& f) {
    each_input(f);
    f("sample_weight", sample_weight);
    f("class_weight", class_weight);
    f("shift", shift);
    f("store", store);
    f("need_x", need_x);
    f("need_class_sum", need_class_sum);
    f("need_largest", need_largest);
    f("sink", sink);
    f("capacity", capacity);
    f("ignore_index", ignore_index);
    SweepOptions::each(f);
  }
};

// kappa [N] as these classes alone would have it: one constant where that serves, else the row's largest logit
// among the classes other than its label, -inf where there is none. The largest over shards is the `shift` of
// all.
struct HeadShiftArguments : HeadInputs {
  static constexpr const char* kName = "head_shift";
  static constexpr const char* kReturns = "Tensor";
  int64_t ignore_index;

  template <class F>
  void each(F&& f) {
    each_input(f);
    f("ignore_index", ignore_index);
    SweepOptions::each(f);
  }
};

// What becomes of the sums over the classes.
struct LossOptions {
  double m1_value, m2_value, m3_value;
  int64_t formula;  // math::Margin
  int64_t guard;    // math::Guard
  bool straight;    // d psi / d cos is taken as 1
  int64_t reduction;
  double smoothing;

  template <class F>
  void each(F&& f) {
    f("m1_value", m1_value);
    f("m2_value", m2_value);
    f("m3_value", m3_value);
    f("formula", formula);
    f("guard", guard);
    f("straight", straight);
    f("reduction", reduction);
    f("smoothing", smoothing);
  }
};

// Margin, weights and losses of the rows, from sums over all classes: loss [N] or [], and its slopes
// [kSlopeFields, N] float64, with `need_margin` [kAllSlopes, N].
struct FinishInputs : HeadOptions, LossOptions {
  Tensor x;
  std::optional<Tensor> scale, m1, m2, m3;
  bool need_margin;
};

struct SoftmaxFinishArguments : FinishInputs {
  static constexpr const char* kName = "softmax_finish";
  static constexpr const char* kReturns = "(Tensor loss, Tensor slopes)";
  Tensor rows, class_sum;

  template <class F>
  void each(F&& f) {
    f("rows", rows);
    f("x", x);
    f("class_sum", class_sum);
    f("scale", scale);
    f("m1", m1);
    f("m2", m2);
    f("m3", m3);
    f("need_margin", need_margin);
    LossOptions::each(f);
    HeadOptions::each(f);
  }
};

// Gradients of sum over i of grad_loss_i loss_i (grad_loss [] or [N]), which is linear in `slopes`. x_sum and
// class_sum are this shard's; an x_sum that the sweep did not make is made here. Of a shard grad_x is in the
// accumulator type: the gradients of the shards are to be added. grad_scale is float64, of the scale's shape.
struct HeadBackwardTensors : HeadInputs {
  Tensor grad_loss, slopes, rows, inverse_norm, x_sum, class_sum, stored;

  template <class F>
  void each(F&& f) {
    f("grad_loss", grad_loss);
    f("slopes", slopes);
    each_input(f);
    f("class_weight", class_weight);
    f("rows", rows);
    f("inverse_norm", inverse_norm);
    f("x_sum", x_sum);
    f("class_sum", class_sum);
    f("stored", stored);
  }
};

struct HeadBackwardArguments : HeadBackwardTensors {
  static constexpr const char* kName = "head_backward";
  static constexpr const char* kReturns = "(Tensor grad_x, Tensor grad_weight, Tensor grad_scale)";
  bool need_x, need_weight, need_scale;

  template <class F>
  void each(F&& f) {
    HeadBackwardTensors::each(f);
    f("need_x", need_x);
    f("need_weight", need_weight);
    f("need_scale", need_scale);
    SweepOptions::each(f);
  }
};

inline void check_inputs(const char* op, const HeadInputs& in) {
  check_head(op, in.x, in.weight, in.is_shard ? 0 : 1);
  check_labels(op, in.labels, in.x.size(0));
  check_centers(op, in.centers, in.weight);
  check_row_numbers(op, "scale", in.scale, in.x);
  check_weights(op, "class_weight", in.class_weight, in.x, in.weight.size(0));
  if (in.term < 0 || in.term >= kTerms)
    fail(op, ": expected `term` in [0, ", int(kTerms), "), got ", in.term);
  // In the accumulator of either kind a term wants the same.
  dispatch_term<float>(in.term, [&]<class Term>() {
    const auto given = [&](const char* name, const std::optional<Tensor>& t, bool wanted, int64_t size) {
      if (wanted != t.has_value())
        fail(op, ": expected ", wanted ? "" : "no ", "`", name, "` with the term ", kTermNames[in.term],
             ", got ", wanted ? "none" : "one");
      if (wanted) check_exact(op, name, *t, ScalarType::Double, {size});
    };
    given("threshold", in.threshold, Term::kThreshold, in.x.size(0));
    given("numbers", in.numbers, Term::kNumbers > 0, Term::kNumbers);
  });
  if (!(in.lowest < in.highest) || !std::isfinite(in.lowest) || !std::isfinite(in.highest))
    fail(op, ": expected `lowest` below `highest`, finite both, got ", in.lowest, " and ", in.highest);
  const bool is_16_bit =
      in.product_precision == ScalarType::Half || in.product_precision == ScalarType::BFloat16;
  if (is_16_bit && accumulator(in.x.scalar_type()) == ScalarType::Double)
    fail(op, ": expected `product_precision` of float64 rows to be float64, got ",
         name_of(in.product_precision));
}

// What head_sweep leaves.
struct SweepResult {
  Array rows, inverse_norm, x_sum, class_sum, stored, listed, found;
};

// All of E, as a device lays it out.
struct StoredCells {
  int64_t count;
  ScalarType type;
};

// What softmax_finish reads and writes.
struct FinishedRows {
  Array rows, class_sum, loss, slopes;
};

inline void check_sweep(const char* op, const HeadSweepArguments& in) {
  check_inputs(op, in);
  check_weights(op, "sample_weight", in.sample_weight, in.x, in.x.size(0));
  check_shift(op, in.shift, in.x.size(0));
  if (in.sink < 0 || in.sink >= kSinks)
    fail(op, ": expected `sink` in [0, ", int(kSinks), "), got ", in.sink);
  if (in.capacity < 0 || (in.sink == kNoSink && in.capacity != 0) ||
      (in.sink == kHardest && in.capacity != 1))
    fail(op, ": expected `capacity` of at least 0, 0 without a sink, 1 for the hardest; got ", in.capacity);
  if (in.centers > 1 && (in.sink != kNoSink || in.need_class_sum))
    fail(op, ": expected neither a `sink` nor `need_class_sum` with ", in.centers, " `centers`");
  if (in.sink == kHardest && (in.store || in.need_x))
    fail(op, ": expected neither `store` nor `need_x` with the hardest, whose gradient is that of one class");
}

inline void check_finish(const char* op, const FinishInputs& in) {
  check_matrix(op, "x", in.x);
  check_row_numbers(op, "scale", in.scale, in.x);
  check_row_numbers(op, "m1", in.m1, in.x);
  check_row_numbers(op, "m2", in.m2, in.x);
  check_row_numbers(op, "m3", in.m3, in.x);
  if (in.reduction < kNone || in.reduction > kSumAll)
    fail(op, ": expected `reduction` to be 0, 1 or 2, got ", in.reduction);
}

inline void check_finish(const SoftmaxFinishArguments& in) {
  check_finish(in.kName, in);
  const ScalarType wide = accumulator(in.x.scalar_type());
  check_exact(in.kName, "rows", in.rows, ScalarType::Double, {kRowFields, in.x.size(0)});
  check_exact(in.kName, "class_sum", in.class_sum, wide, {in.smoothing > 0 ? in.x.size(1) + 1 : 0});
}

inline void check_upstream(const char* op, const Tensor& grad_loss, const Tensor& x) {
  const ScalarType wide = accumulator(x.scalar_type());
  if (grad_loss.dim() == 0)
    check_exact(op, "grad_loss", grad_loss, wide, {});
  else
    check_exact(op, "grad_loss", grad_loss, wide, {x.size(0)});
}

inline void check_backward(const char* op, const HeadBackwardTensors& in) {
  check_inputs(op, in);
  const int64_t N = in.x.size(0), D = in.x.size(1), C = in.weight.size(0);
  const ScalarType wide = accumulator(in.x.scalar_type());
  check_upstream(op, in.grad_loss, in.x);
  const bool all = in.slopes.dim() == 2 && in.slopes.size(0) == kAllSlopes;
  check_exact(op, "slopes", in.slopes, ScalarType::Double, {all ? kAllSlopes : kSlopeFields, N});
  check_exact(op, "rows", in.rows, ScalarType::Double, {kRowFields, N});
  check_exact(op, "inverse_norm", in.inverse_norm, wide, {C});
  if (in.x_sum.numel() != 0) check_exact(op, "x_sum", in.x_sum, wide, {N, D});
  check_exact(op, "class_sum", in.class_sum, wide, {in.class_sum.numel() > 0 ? D + 1 : 0});
}

// E of the sweep, where it was kept: `count` values, as the device lays them out.
inline void check_stored(const char* op, const HeadBackwardTensors& in, ScalarType type, int64_t count) {
  if (in.stored.numel() != 0) check_exact(op, "stored", in.stored, type, {count});
}

}  // namespace nf
