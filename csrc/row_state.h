// The state of one row between forward and backward: rows[field][i], float64, [kRowFields, N].
// kSum and kSumCosine, and the target's fields (zero where the target is elsewhere), add over shards of
// the classes.
#pragma once

namespace nf {

enum RowField {
  kShift,        // kappa
  kSum,          // S = sum over j != y of exp(s c_j - kappa)
  kSumCosine,    // A = the same sum of exp(...) c_j
  kCosine,       // c_y
  kPsi,          // psi(c_y), the target cosine after its margin
  kPsiSlope,     // psi'(c_y)
  kInverseNorm,  // 1 / ||x||
  kRowWeight,    // weight of this row's loss in the result: 0 when ignored, 1/count for the mean
  kTotal,        // math::RowWeights
  kSmooth,
  kPull,
  kPush,
  kRowFields
};

// How CUDA makes 16-bit scores: by cuBLAS, or by score_exp.cu on tensor cores. plan.py chooses.
enum ScoreKernel { kLibraryScores = 0, kTensorCoreScores = 1 };

enum Reduction { kNone = 0, kMean = 1, kSumAll = 2 };

}  // namespace nf
