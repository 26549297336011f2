// Rows that are longer than they are many, split over blocks: enough of them to fill the card a few times over. What
// is found in the splits of a row (a largest, a first, a count) does not depend on how many they are.
#pragma once

#include <algorithm>
#include <device/launch.cuh>

#include "math/host_device.h"

namespace nf {

inline int64_t row_splits(const Queue& queue, int64_t rows, int64_t width) {
  constexpr int64_t kLeastColumns = 512, kPerMultiprocessor = 8, kMost = 65535;
  const int64_t room = kPerMultiprocessor * queue.multiprocessors() / std::max<int64_t>(1, rows);
  return std::clamp<int64_t>(std::min(room, width / kLeastColumns), 1, kMost);
}

struct RowSplit {
  int64_t begin, end;  // columns
};

// The part of block_y, whole classes of `centers` columns.
NF_DEVICE RowSplit row_split(int64_t width, int64_t centers = 1) {
  const int64_t classes = width / centers, splits = block_count_y();
  const int64_t columns = (classes + splits - 1) / splits * centers, begin = block_y() * columns;
  return {begin < width ? begin : width, begin + columns < width ? begin + columns : width};
}

}  // namespace nf
