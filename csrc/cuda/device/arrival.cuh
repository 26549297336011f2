// The last block to come to a place does what needs the results of all: a sum over blocks without another
// launch. The order of arrival decides who does it, never what comes out.
#pragma once

#include <device/launch.cuh>

namespace nf {

// Whether this block is the last of `blocks` that call this with the same counter; every thread of a block
// must call it. The last one then sees what the others wrote to global memory before they came; the others
// may not touch global memory any more. The counter is 0 before the first comes and after the last.
NF_DEVICE bool last_to_arrive(unsigned* counter, unsigned blocks) {
  __syncthreads();  // what all threads of the block wrote, before thread 0 tells that the block has come
  bool last = false;
  if (thread_id() == 0) {
    // Both fences stand next to the atomic, in its thread: what a block wrote then happens before what the
    // last one reads, from barrier to fence to atomic to fence to barrier, as the memory model defines it.
    // The second one also makes the L1 cache forget.
    __threadfence();
    last = atomicAdd(counter, 1u) == blocks - 1;
    __threadfence();
    if (last) *counter = 0;
  }
  return __syncthreads_or(last);
}

// The same where a team (team.cuh) of the block's threads stands for it, and no other writes to global memory. `told`:
// a word of shared memory.
template <class Team>
NF_DEVICE bool last_to_arrive(unsigned* counter, unsigned blocks, const Team& team, unsigned* told) {
  team.sync();  // what all of the team wrote, before its first thread tells that the block has come
  if (team.me() == 0) {
    __threadfence();
    const bool last = atomicAdd(counter, 1u) == blocks - 1;
    __threadfence();
    if (last) *counter = 0;
    *told = last;
  }
  team.sync();  // the word, before it is read
  return *told != 0;
}

}  // namespace nf
