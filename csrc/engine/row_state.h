// The state of one row between forward and backward: rows[field][i], float64, [kRowFields, N].
// head_sweep fills what one shard of the classes knows; what adds over shards is zero where the target is
// elsewhere, and with it summed every shard has the same rows. Whoever makes a loss of them (softmax_finish,
// or the losses over agents in Python) gives back its slopes: slopes[field][i], float64, [kSlopeFields, N], or
// [kAllSlopes, N] with those along the margin.
#pragma once

#include "math/host_device.h"

namespace nf {

enum RowField {
  kSum,            // of the term's values over j != y; softmax: S = sum of E
  kSecondSum,      // of what a term counts besides; softmax: A = sum of E f(c_j)
  kCosine,         // c_y
  kTargetWeight,   // class weight of y; 1 on every shard where there are none, and then not to be summed
  kShift,          // kappa; 0 where the row does not count, as its scores are
  kInverseNorm,    // 1 / ||x||
  kRowWeight,      // weight of this row's loss among the rows': 0 when it does not count
  kLargestCosine,  // cosine of another class, NaN being the largest of all, where asked for; else 0
  kRowFields
};

// The fields by their names in Python, and how the states of shards make that of all classes.
struct FieldRule {
  const char* name;
  const char* over_shards;
};
constexpr FieldRule kRowRules[kRowFields] = {
    {"sum", "sum"},    {"second_sum", "sum"},    {"cosine", "sum"},      {"target_weight", "sum"},
    {"shift", "same"}, {"inverse_norm", "same"}, {"row_weight", "same"}, {"largest", "max"},
};

// d loss / d what a row's loss is made of, loss being the result (weights and the mean's divisor included), or
// with kNone the row's own. All 0 where the row does not count. What backward does is linear in them.
enum SlopeField {
  kOthersSlope,   // along <x_hat, x_sum>, x_sum held: d loss / d c_j is this times e_j, j != y
  kTargetSlope,   // along c_y
  kUniformSlope,  // along <x_hat, class_sum>
  kScaleSlope,    // along s
  kSlopeFields,
  kM1Slope = kSlopeFields,  // along the margin's numbers
  kM2Slope,
  kM3Slope,
  kAllSlopes
};
constexpr const char* kSlopeNames[kAllSlopes] = {"others", "target", "uniform", "scale", "m1", "m2", "m3"};

// Instead of a label: the row counts, and its target is a class of another shard.
constexpr long long kElsewhere = -1;

// The label of a row that does not count, where labels have become rows of the weight (target_center).
constexpr long long kIgnored = -2;

// The place of a label's class among the `width` classes from `first` on, -1 where it is not there. What
// stands for no class (an ignored row) may be any int64, whose difference to `first` need not exist.
NF_HD int64_t target_place(int64_t label, int64_t first, int64_t width) {
  return label >= first && label - first < width ? label - first : -1;
}

// What makes a product: a family of kernels in cuda/products, or the device's library.
enum class Maker {
  kLibrary,  // cuBLAS, BLAS
  kSimt,     // simt_products.cu, where the host knows that the shift is fixed; cuBLAS elsewhere
  kSm80,     // sm80_*.cu: mma.sync
  kSm90,     // sm90_*.cu: wgmma
  kTf32,     // sm80_tf32x3_*.cu: mma.sync, float32
};

// Of a step. products.h says which shapes each way takes.
struct Makers {
  Maker scores, gradient;  // X W^T and what the term makes of it; E^T X
  bool at_once = false;    // each in one kernel with its second product, and E nowhere in memory
};

enum Reduction { kNone = 0, kMean = 1, kSumAll = 2 };

}  // namespace nf
