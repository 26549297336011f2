// What each thread of the running block knows to be done: the order that barriers make.
//
// Time is a count that grows whenever somebody meets somebody; whoever did something, did it at a time. A thread
// knows of another what that one did before some time: by barriers of the block and of a warp, and by clocks, which
// are what an mbarrier or a named barrier carries from those who arrive to those who wait.
//
// Copies and products that run beside the threads are agents: they know nothing, and are known of by who waits for
// them. A thread's ordinary stores are seen by agents only after its fence_shared_for_bulk; that knowledge (`fenced`)
// travels by the same roads.
#pragma once

#include <string>
#include <vector>

#include "block.h"

namespace nf::emulation {

constexpr int kMostAgents = 256;
constexpr int kActors = kMaxThreads + kMostAgents;  // threads first

// Time only grows, from launch to launch, so that nothing has to be reset.
extern uint64_t now;
extern uint64_t block_began;

// Some lanes of a warp did something, the latest of them at `time`. An agent's number is one of warps beyond the
// threads'.
struct Touch {
  enum Kind : uint8_t { kPlain, kAtomic, kCopying };  // the last: a copy that has not landed

  uint64_t time;
  unsigned lanes;
  uint16_t warp;
  Kind kind;
  bool operator==(const Touch&) const = default;
};
constexpr uint16_t kSeveralWarps = 0xffff;
constexpr uint16_t kSeveralBlocks = 0xfffe;
inline bool is_of_agent(const Touch& touch) {
  return touch.warp >= kMaxThreads / kWarp && touch.warp < kSeveralBlocks;
}
Touch touch_by(int actor);

// Whether `thread` knows that touch to be done, one of this block.
bool knows(int thread, const Touch& touch);
// Whether agents that `thread` starts see what an ordinary store of this block wrote.
bool sees_fenced(int thread, const Touch& store);

// A new agent of this block, and what an error calls it.
int new_agent(std::string name);
const std::string& name_of_agent(int actor);
// The running thread has waited for what the agent began before `time`.
void waited_for(int agent, uint64_t time);
// Time goes on, and is returned.
uint64_t tick();
// The running thread's stores so far are seen by agents that are started by who knows of it.
void fence_for_agents();

// What a barrier carries.
struct Clock {
  std::vector<uint64_t> known, fenced;

  void clear();
  void join(const Clock& other);
  void give(int agent, uint64_t time);  // an agent's work before `time` is done
  void release();                       // the running thread puts in what it knows and did
  void acquire(int thread) const;       // and `thread` takes out
};
// Whether clocks order anything in this block yet; until then barriers are all there is.
extern bool clocks_run;

// For block.cpp and watch.cpp.
void clocks_begin();
void met_in_block();
void met_in_warp(int warp, unsigned mask);

}  // namespace nf::emulation
