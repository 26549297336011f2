// Scores by our own kernel for the one architecture with wgmma (compute capability 9.0), of at most
// tiles::Sm90Scores::kMostColumns columns. Otherwise as those of sm80_scores.h. Definition: sm90_scores.cu.
#pragma once

#include "cuda/products/score_task.h"

namespace nf {

int64_t sm90_score_splits(const Queue& queue, int64_t batch, int64_t width);
void sm90_score_largest(Queue& queue, const ScoreTask& task);
void sm90_score_fold(Queue& queue, const ScoreTask& task);

}  // namespace nf
