// The usual block of a kernel over rows, and grids with a warp or a thread for each of them.
#pragma once

#include <device/launch.cuh>

namespace nf {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;

inline Grid warp_per_row(int64_t rows) { return {(rows + kRowsPerBlock - 1) / kRowsPerBlock}; }
inline Grid thread_per(int64_t count) { return {(count + kThreads - 1) / kThreads}; }

}  // namespace nf
