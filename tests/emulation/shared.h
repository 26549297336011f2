// The shared memory of the block that is running, and who touched which byte of it when.
//
// Its bytes are 0xFF before each block, which reads as NaN in every floating type: what a kernel
// forgets to write cannot pass for a zero. Then every access is checked. The compiler hands them to
// us: -fsanitize=thread turns each load and store into a call, and the calls go to hooks.cpp, not
// to ThreadSanitizer, which knows nothing of barriers. A byte that two threads touch, one of them
// writing, with no barrier between the two, is a race and an error, in whichever order the two came
// this time.
#pragma once

#include "block.h"

namespace nf::emulation {

// The array that is the block's `index`-th, `offset` bytes from the start. All threads of the block
// must ask for the same arrays.
unsigned char* take_shared(int index, size_t offset, size_t bytes, Where where);
bool is_shared(const void* address, size_t bytes);

enum class Access { kRead, kWrite, kAtomic };
// Does nothing for addresses outside shared memory.
void check_access(const void* address, size_t bytes, Access access);

// *at += value, for int, unsigned and int64_t, anywhere in memory. One fibre runs at a time, so plain
// addition is atomic; it only has to be told from a plain write.
template <class T>
T fetch_add(T* at, T value);

// Asynchronous copies of the running thread, see device/copy_async.cuh.
struct alignas(16) Bytes16 {
  unsigned char at[16];
};
void start_copy(void* shared, const Bytes16& bytes);
void commit_copies();
void land_copies(int groups_left_in_flight);

// For block.cpp: a block begins; threads have met, so that what they did before is done.
void begin_shared(size_t bytes, int threads);
void met_in_block();
void met_in_warp(int warp, unsigned mask);

}  // namespace nf::emulation
