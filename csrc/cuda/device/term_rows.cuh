// What the rows say to their term (math/terms), in device memory: the kernels of every product take it as it is.
#pragma once

#include "cuda/device/stored.cuh"
#include "engine/terms.h"

namespace nf {

// A row that does not count has zero features, and says nothing here: its shift and its threshold are 0.
struct TermRows {
  int64_t term;             // Term: the host chooses the kernel by it
  const int64_t* labels;    // [N]: the target's place among all classes at hand
  RowNumbers scale;         // [N] or one of all
  const double* shift;      // [N]
  const double* threshold;  // [N], or null where the term has none
  const double* numbers;    // [kNumbers of the term] or null

  template <class T>
  NF_DEVICE math::TermRow<T> at(int64_t i) const {
    return {T(scale.at(i)), T(shift[i]), threshold != nullptr ? T(threshold[i]) : T(0)};
  }
};

}  // namespace nf
