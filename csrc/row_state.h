// The state of one row between forward and backward: rows[field][i], float64, [kRowFields, N].
// normface_sweep fills what one shard of the classes knows. The first kShardSums fields add over shards
// (zero where the target is elsewhere); with them summed, normface_finish fills the rest, and every shard
// has the same rows.
#pragma once

namespace nf {

enum RowField {
  kSum,           // S = sum over j != y of exp(s c_j - kappa)
  kSumCosine,     // A = the same sum of exp(...) c_j
  kCosine,        // c_y
  kTargetWeight,  // class weight of y; 1 on every shard where there are none, and then not to be summed
  kShift,         // kappa
  kInverseNorm,   // 1 / ||x||
  kRowWeight,     // weight of this row's loss in the result: 0 when ignored, 1/count for the mean
  kPsi,           // psi(c_y), the target cosine after its margin
  kPsiSlope,      // psi'(c_y)
  kTotal,         // math::RowWeights
  kSmooth,
  kPull,
  kPush,
  kRowFields,
  kShardSums = kShift
};

// Instead of a label: the row counts, and its target is a class of another shard.
constexpr long long kElsewhere = -1;

// How CUDA makes 16-bit scores: by cuBLAS, or by score_exp.cu on tensor cores. plan.py chooses.
enum ScoreKernel { kLibraryScores = 0, kTensorCoreScores = 1 };

enum Reduction { kNone = 0, kMean = 1, kSumAll = 2 };

}  // namespace nf
