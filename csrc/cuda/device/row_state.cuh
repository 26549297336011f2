// The tables [field][i] of row_state.h, in device memory.
#pragma once

#include <device/launch.cuh>

#include "checks.h"
#include "cuda/device/team.cuh"
#include "engine/block.h"
#include "engine/row_state.h"
#include "math/larger.h"

namespace nf {

template <class Field>
struct TableOfRows {
  double* data;
  int64_t batch;

  TableOfRows(const Array& table, int64_t rows) : data(data_of<double>(table)), batch(rows) {}
  explicit TableOfRows(const Tensor& rows)
      : data(static_cast<double*>(const_cast<void*>(rows.const_data_ptr()))), batch(rows.size(1)) {}
  NF_DEVICE double& at(Field field, int64_t i) const { return data[field * batch + i]; }
  const double* of(Field field) const { return data + field * batch; }
};
using RowState = TableOfRows<RowField>;
using RowSlopes = TableOfRows<SlopeField>;

// Where a sweep leaves the sums of its rows, and their largest cosines where those are wanted: every block of a
// row its own, and the last one adds them up.
struct SweepSums {
  RowState rows;
  double* partial;       // [2, splits, batch], or null: the sums are not wanted
  unsigned* arrivals;    // [one per row, or per block of rows], all 0
  bool largest = false;  // partial is [3, splits, batch]

  NF_DEVICE double& value(int64_t split, int64_t i) const { return partial[split * rows.batch + i]; }
  NF_DEVICE double& second(int64_t split, int64_t splits, int64_t i) const {
    return partial[(splits + split) * rows.batch + i];
  }
  NF_DEVICE double& largest_cosine(int64_t split, int64_t splits, int64_t i) const {
    return partial[(2 * splits + split) * rows.batch + i];
  }
  // The sums of the rows [first, end) += the partial ones: a thread takes every so-manieth split of a row, then what
  // the threads of a row have is added pair by pair. By all of the team, whose number is a power of two no smaller
  // than that of the rows; scratch holds kScratch for each of them.
  static constexpr int kScratch = 3;
  template <bool kWithLargest, class Team = WholeBlock>
  NF_DEVICE void add(int64_t splits, int64_t first, int64_t end, double* scratch,
                     const Team& team = Team()) const {
    const int threads = team.threads(), me = team.me();
    int across = 1;
    while (across < end - first) across *= 2;
    const int groups = threads / across, group = me / across;
    const int64_t i = first + me % across;
    double of_value = 0, of_second = 0, best = -INFINITY;
    if (i < end) {
#pragma unroll 2
      for (int64_t k = group; k < splits; k += groups) {
        of_value += value(k, i);
        of_second += second(k, splits, i);
        if constexpr (kWithLargest) best = math::larger(best, largest_cosine(k, splits, i));
      }
    }
    scratch[me] = of_value, scratch[threads + me] = of_second;
    if constexpr (kWithLargest) scratch[2 * threads + me] = best;
    for (int left = groups / 2; left > 0; left /= 2) {
      team.sync();  // what the threads above `left` groups have, before it is read
      if (group >= left) continue;
      const int other = me + left * across;
      scratch[me] += scratch[other], scratch[threads + me] += scratch[threads + other];
      if constexpr (kWithLargest)
        scratch[2 * threads + me] = math::larger(scratch[2 * threads + me], scratch[2 * threads + other]);
    }
    if (group > 0 || i >= end) return;
    rows.at(kSum, i) += scratch[me];
    rows.at(kSecondSum, i) += scratch[threads + me];
    if constexpr (kWithLargest)
      rows.at(kLargestCosine, i) = math::larger(rows.at(kLargestCosine, i), scratch[2 * threads + me]);
  }
};

}  // namespace nf
