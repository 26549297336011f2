// The arguments of what the losses over agents need beside the sweep (head_arguments.h), for both devices (op.h):
// cosines of listed pairs of a row and a class, and their gradients; what comes before and after the sweep, whose
// formulas are in math/terms/hinge.h.
//
// x [N, D], weight [C, D], labels [N] int64 in [0, C); a row with ignore_index counts nowhere. `is_shard`: C
// may be 0, and a label of -1 (kElsewhere) has its agent in another shard: every class here is a negative.
#pragma once

#include "engine/op.h"
#include "engine/row_state.h"
#include "engine/terms.h"

namespace nf {

NF_HD bool is_class(int64_t entry, int64_t classes) { return uint64_t(entry) < uint64_t(classes); }

struct AgentOperands {
  Tensor x, weight, labels;

  template <class F>
  void each(F&& f) {
    f("x", x);
    f("weight", weight);
    f("labels", labels);
  }
};

// cos(x_i, w_labels[i]) in float64, [N]; 0 where the agent is not here, so that shards add.
struct TargetCosineArguments : AgentOperands {
  static constexpr const char* kName = "target_cosine";
  static constexpr const char* kReturns = "Tensor";
  int64_t ignore_index;
  double eps;
  bool is_shard;

  template <class F>
  void each(F&& f) {
    AgentOperands::each(f);
    f("ignore_index", ignore_index);
    f("eps", eps);
    f("is_shard", is_shard);
  }
};

// Of a weight with `centers` rows per class, class j's being j centers + k: the row nearest to x_i among those of
// its label's class [N], int64; of equal ones the first. kElsewhere stays, and a row that is ignored has kIgnored.
struct TargetCenterArguments : TargetCosineArguments {
  static constexpr const char* kName = "target_center";
  int64_t centers;

  template <class F>
  void each(F&& f) {
    TargetCosineArguments::each(f);
    f("centers", centers);
  }
};

// The distance to the label's agent [N] in the accumulator type, 0 where the row does not count, and the
// `threshold` [N] of the hinges. cosine [N] float64 is what the shards' target_cosine add up to; without it, it
// is found here. A margin is a float, or a floating 0-d tensor on the device of x.
struct HingeThresholdArguments : TargetCosineArguments {
  static constexpr const char* kName = "hinge_threshold";
  static constexpr const char* kReturns = "(Tensor distance, Tensor threshold)";
  std::optional<Tensor> cosine, margin;
  double margin_value;
  bool triplet;

  template <class F>
  void each(F&& f) {
    AgentOperands::each(f);
    f("cosine", cosine);
    f("margin", margin);
    f("margin_value", margin_value);
    f("triplet", triplet);
    f("ignore_index", ignore_index);
    f("eps", eps);
    f("is_shard", is_shard);
  }
};

// What head_backward is linear in, [kSlopeFields, N], from the gradients [N] of the distance and of the sum of
// the hinges, in one accumulator type, and the rows' state, with sums over all classes. These gradients may be 0
// where a row counts; there is no scale, so a slope of 1 along it says that the row does, and shows its NaN.
struct HingeSlopesArguments {
  static constexpr const char* kName = "hinge_slopes";
  static constexpr const char* kReturns = "Tensor";
  Tensor rows, grad_distance, grad_hinges;
  bool triplet;
  int64_t term;

  template <class F>
  void each(F&& f) {
    f("rows", rows);
    f("grad_distance", grad_distance);
    f("grad_hinges", grad_hinges);
    f("triplet", triplet);
    f("term", term);
  }
};

// What cosine_pairs_backward takes: every row's target, and the first `width` of what the sweep's sink collected,
// each with the gradient of its cosine, [N, 1 + width] both. Where a row does not count they are `count`, that of
// the classes at hand: whatever those hold does not reach the row. `hardest`: a row's one coefficient is in its sums,
// and found [N, capacity] its cosine.
struct HingePairsArguments {
  static constexpr const char* kName = "hinge_pairs";
  static constexpr const char* kReturns = "(Tensor factors, Tensor classes, Tensor x_inverse)";
  Tensor rows, slopes, labels, listed, found;
  int64_t width, count;
  bool hardest;
  int64_t term;

  template <class F>
  void each(F&& f) {
    f("rows", rows);
    f("slopes", slopes);
    f("labels", labels);
    f("listed", listed);
    f("found", found);
    f("width", width);
    f("count", count);
    f("hardest", hardest);
    f("term", term);
  }
};

// Gradients of sum over i, k of factors[i, k] cos(x_i, w_classes[i, k]), from the saved inverse norms. Entries
// that are no class are unused, and a row of nothing else gets zeros.
struct CosinePairsBackwardArguments {
  static constexpr const char* kName = "cosine_pairs_backward";
  static constexpr const char* kReturns = "(Tensor grad_x, Tensor grad_weight)";
  Tensor x, weight;
  Tensor factors, classes;  // [N, listed]
  Tensor x_inverse, weight_inverse;
  bool need_x, need_weight;
  double eps;
  bool is_shard;

  template <class F>
  void each(F&& f) {
    f("x", x);
    f("weight", weight);
    f("factors", factors);
    f("classes", classes);
    f("x_inverse", x_inverse);
    f("weight_inverse", weight_inverse);
    f("need_x", need_x);
    f("need_weight", need_weight);
    f("eps", eps);
    f("is_shard", is_shard);
  }
};

inline void check(const TargetCosineArguments& in) {
  check_head(in.kName, in.x, in.weight, in.is_shard ? 0 : 1);
  check_labels(in.kName, in.labels, in.x.size(0));
}

inline void check(const TargetCenterArguments& in) {
  check(static_cast<const TargetCosineArguments&>(in));
  check_centers(in.kName, in.centers, in.weight);
}

inline void check(const HingeThresholdArguments& in) {
  check(static_cast<const TargetCosineArguments&>(in));
  if (in.cosine) check_exact(in.kName, "cosine", *in.cosine, ScalarType::Double, {in.x.size(0)});
  check_number(in.kName, "margin", in.margin, in.x);
}

// The field of a row with the sum of its coefficients.
inline RowField slope_field(const char* op, int64_t term) {
  if (term != kHingeTerm && term != kExponentialHingeTerm)
    fail(op, ": expected `term` to be one of the hinges, got ", term);
  return term == kExponentialHingeTerm ? kSum : kSecondSum;
}

inline int64_t check_rows(const char* op, const Tensor& rows) {
  const int64_t N = rows.dim() == 2 ? rows.size(1) : 0;
  check_exact(op, "rows", rows, ScalarType::Double, {kRowFields, N});
  return N;
}

inline void check(const HingeSlopesArguments& in) {
  const int64_t N = check_rows(in.kName, in.rows);
  const ScalarType wide = accumulator(in.grad_distance.scalar_type());
  check_exact(in.kName, "grad_distance", in.grad_distance, wide, {N});
  check_exact(in.kName, "grad_hinges", in.grad_hinges, wide, {N});
}

inline void check(const HingePairsArguments& in) {
  const int64_t N = check_rows(in.kName, in.rows);
  check_exact(in.kName, "slopes", in.slopes, ScalarType::Double, {kSlopeFields, N});
  check_labels(in.kName, in.labels, N);
  if (in.listed.dim() != 2 || in.width < 0 || in.width > in.listed.size(1))
    fail(in.kName, ": expected `listed` of at least ", in.width, " columns, got shape ", shape_of(in.listed));
  check_exact(in.kName, "listed", in.listed, ScalarType::Long, {N, in.listed.size(1)});
  check_exact(in.kName, "found", in.found, accumulator(in.found.scalar_type()), {N, in.listed.size(1)});
}

inline void check(const CosinePairsBackwardArguments& in) {
  const char* op = in.kName;
  check_head(op, in.x, in.weight, in.is_shard ? 0 : 1);
  const ScalarType wide = accumulator(in.x.scalar_type());
  if (in.classes.dim() != 2) fail(op, ": expected `classes` to be 2-D, got shape ", shape_of(in.classes));
  check_exact(op, "classes", in.classes, ScalarType::Long, {in.x.size(0), in.classes.size(1)});
  check_exact(op, "factors", in.factors, wide, {in.x.size(0), in.classes.size(1)});
  check_exact(op, "x_inverse", in.x_inverse, wide, {in.x.size(0)});
  check_exact(op, "weight_inverse", in.weight_inverse, wide, {in.weight.size(0)});
}

}  // namespace nf
