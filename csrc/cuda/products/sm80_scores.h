// Scores by our own tensor-core kernel for compute capability 8.0. Definition: sm80_scores.cu.
#pragma once

#include "cuda/products/score_task.h"

namespace nf {

// Blocks along the classes, each with its own partial sums.
int64_t score_splits(const Queue& queue, int64_t batch, int64_t dim, int64_t width);

// `largest[split][i]` = the row's largest s f(c_j) of the split, j != y_i, for terms that have a shift. Where the
// fixed one serves the one scale of all rows, it returns at once and writes nothing.
void score_largest(Queue& queue, const ScoreTask& task);

// Coefficients and their sums.
void score_fold(Queue& queue, const ScoreTask& task);

}  // namespace nf
