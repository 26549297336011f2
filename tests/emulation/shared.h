// The shared memory of the block that is running, or of each block of a cluster.
//
// Its bytes are 0xFF before each block, which reads as NaN in every floating type: what a kernel
// forgets to write cannot pass for a zero.
#pragma once

#include <string>

#include "block.h"

namespace nf::emulation {

// A block begins, with so many bytes and threads.
void begin_shared(size_t bytes, int threads);

// The block's array number `index`, `offset` bytes from the start. All threads of the block must ask
// for the same arrays. It begins at a multiple of 1024 bytes if the offset is one.
unsigned char* take_shared(int index, size_t offset, size_t bytes, Where where);

bool is_shared(const void* address);
// The same place of another block of the cluster.
unsigned char* in_block(const void* address, int of_rank);
// What a descriptor of wgmma calls an address, 18 bits, and back.
uint32_t shared_address(const void* address);
unsigned char* at_shared_address(uint32_t address);
bool is_in_one_array(const void* address, size_t bytes);
// "byte 12 of the shared array taken at reduce.cuh:30" or "global memory at 0x…"
std::string name_of(uintptr_t address);

// Asynchronous copies of the running thread, see device/copy_async.cuh.
struct alignas(16) Bytes16 {
  unsigned char at[16];
};
void start_copy(void* shared, const Bytes16& bytes);
void commit_copies();
void land_copies(int groups_left_in_flight);

}  // namespace nf::emulation
