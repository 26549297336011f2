// Who touched which byte of memory when, and whether that was allowed.
//
// The compiler hands us every access of the kernels: -fsanitize=thread turns each load and store into
// a call, and the calls go to hooks.cpp, not to ThreadSanitizer, which knows nothing of barriers. Two
// threads that touch the same byte, one of them writing, with no barrier between them (clocks.h), are a race and
// an error, in whichever order the two came this time. So are two blocks of one launch, which no
// barrier can part. (Under AddressSanitizer, which cannot be had together with this, nobody calls.)
#pragma once

#include "block.h"

namespace nf::emulation {

enum class Access { kRead, kWrite, kAtomic };
void check_access(const void* address, size_t bytes, Access access);

// *at += value, for int, unsigned and int64_t. One fibre runs at a time, so plain addition is atomic;
// it only has to be told from a plain write.
template <class T>
T fetch_add(T* at, T value);

// From here to there the running thread has an asynchronous copy on its way.
void copy_departs(void* to, size_t bytes);
void copy_lands(void* to, size_t bytes);

// What agents (clocks.h) do, which the running thread starts: an error unless everything before is known to it, or
// to all of `starters`, and what was stored in shared memory by threads is fenced.
void agent_reads(int agent, const void* from, size_t bytes, const int* starters, int count);
void agent_writes(int agent, void* to, size_t bytes);

// The running block comes to the place that `counter` stands for, where `blocks` are expected. If it is the
// last, what those blocks did happened before whatever it does next; if not, global memory is closed to it.
void arrive(unsigned* counter, unsigned blocks);
bool arrived_last();

// For block.cpp.
void launch_begins();
void block_begins();

}  // namespace nf::emulation
