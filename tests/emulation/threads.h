// The threads of the running block as block.cpp runs them and meetings.cpp lets them meet.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "block.h"
#include "fibre.h"

namespace nf::emulation {

struct Thread {
  enum State { kReady, kInBlockMeeting, kInWarpMeeting, kWaiting, kExited };

  Fibre fibre;
  State state;
  // While it waits: for what, and what it brought.
  const char* kind;
  Where where;
  unsigned mask;
  void* offer;
  const void* on;
  Describe describe;
};

struct Warp {
  unsigned present;  // lanes that exist: the last warp of a block need not be full
  unsigned ready;    // lanes that can go on
  unsigned waiting;  // lanes in a meeting of the warp
  unsigned exited;
};

extern std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch, for their stacks
extern std::vector<Warp> warps;

inline Thread& current() { return *threads[place.thread]; }
inline Warp& current_warp() { return warps[place.thread / kWarp]; }
inline unsigned current_bit() { return 1u << place.thread % kWarp; }

std::string text_of(Where where);
bool same(Where a, Where b);

// The running thread stops; set_ready lets it go on.
void stop(Thread::State state, const char* kind, Where where);
void set_ready(int thread);

void meetings_begin();

}  // namespace nf::emulation
