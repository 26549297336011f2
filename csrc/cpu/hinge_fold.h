// What the sweep of agent_hinge gathers about a row: each thread folds the cosines of its tiles, and the
// folds of one row are joined in the order of the classes.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/library.h"
#include "engine/hinge_state.h"
#include "math/terms/hinge.h"

namespace nf::cpu {

// rows[field][i]
struct HingeRows {
  double* data;
  int64_t batch;

  explicit HingeRows(const Tensor& rows)
      : data(static_cast<double*>(const_cast<void*>(rows.const_data_ptr()))), batch(rows.size(1)) {}
  double* operator[](HingeField field) const { return data + field * batch; }
};

// What one thread has gathered about one row.
template <class T>
struct RowFold {
  double sum = 0, value = 0, slope = 0, active = 0, cosine = 0;
  T best = -T(INFINITY);
  int64_t best_class = -1;
  std::vector<int64_t> classes;  // the first active ones
  std::vector<T> slopes;
};

struct FoldOptions {
  bool hardest;
  bool exponential;
  int64_t capacity;
};

// Cosines [begin, end) of a tile's row into the fold.
template <class T>
void fold(const T* row, int64_t begin, int64_t end, int64_t first, T threshold, const FoldOptions& options,
          RowFold<T>& into) {
  const auto part = accum_rows<T>().hinge_fold(row + begin, end - begin, threshold);
  into.sum += part.excess;
  into.active += part.active;
  into.cosine += part.cosine;
  if (options.hardest) {
    const T best = accum_rows<T>().largest_scaled(row + begin, end - begin, T(1));
    if (!(best > into.best)) return;
    into.best = best;
    for (int64_t j = begin; j < end; ++j)
      if (row[j] == best) {
        into.best_class = first + j;
        return;
      }
    return;
  }
  if (part.active == 0) return;
  const bool listing = int64_t(into.classes.size()) < options.capacity;
  if (!listing && !options.exponential) return;
  for (int64_t j = begin; j < end; ++j) {
    const auto h = math::hinge_term<T>(options.exponential, threshold, row[j]);
    if (h.slope == T(0)) continue;
    into.value += h.value;
    into.slope += h.slope;
    if (int64_t(into.classes.size()) >= options.capacity) continue;
    into.classes.push_back(first + j);
    into.slopes.push_back(h.slope);
  }
}

// The folds of all threads of one row, in the order of the classes, into its state and its list.
template <class T>
void finish_row(const HingeRows& rows, int64_t i, const FoldOptions& options, const RowFold<T>* folds,
                int64_t slots, int64_t no_class, T* value, int64_t* classes, T* slopes) {
  RowFold<T> all;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const RowFold<T>& part = folds[slot * rows.batch + i];
    all.sum += part.sum;
    all.value += part.value;
    all.slope += part.slope;
    all.active += part.active;
    all.cosine += part.cosine;
    if (part.best > all.best) {
      all.best = part.best;
      all.best_class = part.best_class;
    }
    for (size_t k = 0; k < part.classes.size() && int64_t(all.classes.size()) < options.capacity; ++k) {
      all.classes.push_back(part.classes[k]);
      all.slopes.push_back(part.slopes[k]);
    }
  }
  if (options.hardest) {
    const auto h = math::hinge_term<T>(options.exponential, T(rows[kHingeThreshold][i]), all.best);
    const bool exists = all.best_class >= 0 && h.slope != T(0);
    all.value = exists ? double(h.value) : 0.0;
    all.slope = exists ? double(h.slope) : 0.0;
    if (all.sum != all.sum) all.value = all.sum;  // NaN among the cosines shows
    if (exists && options.capacity > 0) {
      all.classes.push_back(all.best_class);
      all.slopes.push_back(h.slope);
    }
  } else if (!options.exponential) {
    all.value = all.sum;
    all.slope = all.active;
  }
  const bool ignored = rows[kHingeCounts][i] == 0.0;
  rows[kExcessSum][i] = ignored ? 0.0 : all.sum;
  rows[kLossValue][i] = ignored ? 0.0 : all.value;
  rows[kHingeSlope][i] = ignored ? 0.0 : all.slope;
  rows[kHingeActive][i] = ignored ? 0.0 : all.active;
  rows[kHingeCosine][i] = ignored ? 0.0 : all.cosine;
  rows[kHingeBest][i] = all.best;
  rows[kHingeBestClass][i] = double(all.best_class);
  value[i] = T(rows[kLossValue][i]);
  for (int64_t k = 0; k < options.capacity; ++k) {
    const bool used = !ignored && k < int64_t(all.classes.size());
    classes[k] = used ? all.classes[size_t(k)] : no_class;
    if (slopes != nullptr) slopes[k] = used ? all.slopes[size_t(k)] : T(0);
  }
}

}  // namespace nf::cpu
