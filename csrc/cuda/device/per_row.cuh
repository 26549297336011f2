// The usual block of a kernel over rows, and grids with a warp or a thread for each of them.
#pragma once

#include <device/launch.cuh>

namespace nf {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;

inline Grid warp_per_row(int64_t rows) { return {(rows + kRowsPerBlock - 1) / kRowsPerBlock}; }
inline Grid warp_per_rows(int64_t rows, int64_t of_a_warp) {
  return warp_per_row((rows + of_a_warp - 1) / of_a_warp);
}
inline Grid thread_per(int64_t count) { return {(count + kThreads - 1) / kThreads}; }

}  // namespace nf
