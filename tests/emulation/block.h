// The threads of a block, run on a CPU under CUDA's rules.
//
// Each CUDA thread is a fibre. It runs alone until it comes to a point where CUDA threads meet: a
// barrier of the block, or one of the exchanges of a warp. There it stops, and goes on when all who
// are expected have come. Blocks run one after another. Nothing happens twice at the same time, so
// a run is exactly repeatable, and whatever goes wrong can be said in a sentence with a block and a
// thread in it.
//
// What CUDA leaves undefined is an error here: threads that wait at different barriers, lanes that
// name different masks, a lane that left while others count on it. And because the order in which
// real threads run is nobody's promise, it can be turned round from outside
// (NORMFACE_EMULATION_ORDER, see run()): a kernel whose result depends on it is wrong.
//
// shared.h has the shared memory, watch.h tells how every access to memory is watched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

namespace nf::emulation {

using Where = std::source_location;

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxThreads = 1024;
constexpr size_t kSharedLimit = 227 * 1024;  // bytes per block on compute capability 9.0

constexpr int kMostBlocks = 2;  // of a cluster

// Where the running thread stands. The blocks of a cluster run together, as one: its threads are those of the first
// block, then those of the second. block_x is the first one's.
struct Place {
  int thread, threads, of_block;
  int64_t block_x, blocks_x;
  int64_t block_y, blocks_y;
};
extern Place place;
inline int rank_of(int thread) { return thread / place.of_block; }
inline int rank() { return rank_of(place.thread); }
// The same for kernels, whose own accesses to memory are watched and so cost more.
int thread_id();
int threads_per_block();
int64_t block_id();
int64_t block_count();
int64_t block_y();
int64_t block_count_y();

// Runs `kernel` once for every thread of every block, `cluster` neighbours along x together, and throws std::runtime_error if any of them
// breaks a rule. NORMFACE_EMULATION_ORDER decides who goes first: "forward" (the default),
// "reverse", or a number, the seed of a shuffle of blocks, of warps and of lanes.
void run(const char* name, int64_t blocks_x, int64_t blocks_y, int cluster, int threads, size_t shared_bytes,
         const std::function<void()>& kernel);

// Whether this operating-system thread is inside a kernel, and not in the code around a launch.
extern thread_local bool in_kernel [[gnu::tls_model("initial-exec")]];

// Ends the launch with an error that names kernel, block and thread. It unwinds nothing: it stops
// this fibre and never resumes it, so it may be called from anywhere, including the depths of a
// sanitizer's hook. Kernels hold nothing that needs a destructor.
[[noreturn]] [[gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// Waits for every thread of the block, or of the cluster.
void meet_block(Where where);
void meet_cluster(Where where);

// Waits for the lanes of `mask`, who must come for the same `kind` of meeting with the same mask
// and from the same line. The last to come calls complete() with what each lane brought, by lane.
using Complete = void (*)(void* const* offers, unsigned mask);
void meet_warp(const char* kind, unsigned mask, Where where, void* offer = nullptr,
               Complete complete = nullptr);

// Waits for the 128 threads of the warpgroup, who must come for the same kind of meeting from the same line.
void meet_warpgroup(const char* kind, Where where, void* offer, void (*complete)(void* const* offers));

// The barriers 1 ... 15 of some warps: waits for, or only counts as one of, `expected` threads.
void sync_threads(int number, int expected, Where where);
void arrive_threads(int number, int expected);

// Waits until somebody calls set_ready (threads.h); describe(on) says what for, should nobody.
using Describe = std::string (*)(const void* on);
void wait_for(const char* kind, Where where, const void* on, Describe describe);

}  // namespace nf::emulation
