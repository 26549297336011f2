// Rows of dW of some classes into a rule of math/update.h. Definition: update_rows.cu.
#pragma once

#include <device/launch.cuh>

#include "engine/update_arguments.h"

namespace nf {

// Classes whose rows of dW lie in memory at once: so few that they are still in the cache of a GPU when they are
// read, within an eighth of the workspace, and so many that their product fills the GPU. Whole classes of several
// centers, in multiples of 8, since a row of E may begin at any of them.
inline int64_t classes_of_update(const HeadInputs& in) {
  constexpr int64_t kMostBytes = int64_t(16) << 20;
  const int64_t group = 8 * in.centers, row = in.weight.size(1) * int64_t(in.weight.element_size());
  return group *
         std::max<int64_t>(1, std::min(kMostBytes, in.workspace / 8) / std::max<int64_t>(1, group * row));
}

// dw [width, D], stored as the weight is, are the rows of the classes from `first` on.
void update_rows(Queue& queue, const HeadUpdateArguments& in, int64_t first, int64_t width, const Array& dw);

}  // namespace nf
