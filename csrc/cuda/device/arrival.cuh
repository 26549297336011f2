// The last block to come to a place does what needs the results of all: a sum over blocks without another
// launch. The order of arrival decides who does it, never what comes out.
#pragma once

#include <device/launch.cuh>

namespace nf {

// Whether this block is the last of `blocks` that call this with the same counter; every thread of a block
// must call it. The last one then sees what the others wrote to global memory before they came; the others
// may not touch global memory any more. The counter is 0 before the first comes and after the last.
NF_DEVICE bool last_to_arrive(unsigned* counter, unsigned blocks) {
  __threadfence();  // what this thread wrote, before anyone is told that this block has come
  __syncthreads();  // all threads of the block have come
  const bool last = __syncthreads_or(thread_id() == 0 && atomicAdd(counter, 1u) == blocks - 1);
  if (!last) return false;
  __threadfence();  // what the others wrote, before this thread reads it
  if (thread_id() == 0) *counter = 0;
  return true;
}

}  // namespace nf
