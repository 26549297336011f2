// Threads of a block that work together and wait for each other: how many, which of them this one is, a barrier.
#pragma once

#include <device/launch.cuh>

namespace nf {

struct WholeBlock {
  NF_DEVICE int threads() const { return threads_per_block(); }
  NF_DEVICE int me() const { return thread_id(); }
  NF_DEVICE void sync() const { sync_block(); }
};

}  // namespace nf
