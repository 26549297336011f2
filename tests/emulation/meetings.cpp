// Where threads meet: all of a block, lanes of a warp, warpgroups, and the numbered barriers of some warps.
#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <vector>

#include "block.h"
#include "clocks.h"
#include "threads.h"

namespace nf::emulation {
namespace {

// Of a block, and of the cluster.
struct All {
  int waiting;
  int first;  // of those who wait
};
All blocks[kMostBlocks], cluster;
Clock of_cluster;

// Of a warpgroup.
struct Meeting {
  int waiting;
  int first;  // of those who wait
  void* offers[kWarpgroup];
};
Meeting meetings[kMaxThreads / kWarpgroup];

struct Numbered {
  int expected, came;
  std::vector<int> waiting;
  Clock clock;
};
constexpr int kNumbered = 16;
Numbered numbered[kMostBlocks][kNumbered];  // 0 is sync_block's

}  // namespace

void meetings_begin() {
  for (All& block : blocks) block.waiting = 0;
  cluster.waiting = 0;
  of_cluster.clear();
  for (Meeting& meeting : meetings) meeting.waiting = 0;
  for (auto& of_block : numbered)
    for (Numbered& barrier : of_block) {
      barrier.came = 0;
      barrier.waiting.clear();
      barrier.clock.clear();
    }
}

// Whether the running thread is the last of `count` to come; else it has waited.
static bool come_to(All& all, const char* kind, int count, Where where) {
  if (all.waiting == 0) all.first = place.thread;
  const Where expected = all.waiting == 0 ? where : threads[all.first]->where;
  if (!same(where, expected)) {
    fail("%s at %s, while thread %d waits in the one at %s", kind, text_of(where).c_str(), all.first,
         text_of(expected).c_str());
  }
  all.waiting += 1;
  if (all.waiting < count) {
    stop(Thread::kInBlockMeeting, kind, where);
    return false;
  }
  all.waiting = 0;
  return true;
}

void meet_block(Where where) {
  if (!come_to(blocks[rank()], "sync_block", place.of_block, where)) return;
  const int first = rank() * place.of_block;
  for (int thread = first; thread < first + place.of_block; ++thread) set_ready(thread);
  met_in_block();
}

void meet_cluster(Where where) {
  of_cluster.release();
  if (come_to(cluster, "sync_cluster", place.threads, where)) {
    for (int thread = 0; thread < place.threads; ++thread) {
      of_cluster.acquire(thread);
      set_ready(thread);
    }
    of_cluster.clear();
  }
}

namespace {

void check_same_meeting(const char* kind, unsigned mask, Where where, int other_thread) {
  const Thread& other = *threads[other_thread];
  if (other.mask == mask && strcmp(other.kind, kind) == 0 && same(other.where, where)) return;
  fail("%s at %s with mask %08x, while thread %d waits in %s at %s with mask %08x", kind,
       text_of(where).c_str(), mask, other_thread, other.kind, text_of(other.where).c_str(), other.mask);
}

void check_meeting(const char* kind, unsigned mask, Where where) {
  const Warp& warp = current_warp();
  const int first = place.thread / kWarp * kWarp;
  if (!(mask & current_bit())) fail("%s with mask %08x, which leaves out this lane", kind, mask);
  if (mask & ~warp.present) fail("%s with mask %08x names lanes the block has not", kind, mask);
  if (mask & warp.exited) {
    fail("%s at %s with mask %08x waits for thread %d, which exited", kind, text_of(where).c_str(), mask,
         first + std::countr_zero(mask & warp.exited));
  }
  // Those who wait inside the mask have been compared with one another, so any one of them will do.
  if (warp.waiting & mask) {
    check_same_meeting(kind, mask, where, first + std::countr_zero(warp.waiting & mask));
  }
  for (unsigned others = warp.waiting & ~mask; others != 0; others &= others - 1) {
    const int other = first + std::countr_zero(others);
    if (threads[other]->mask & current_bit()) check_same_meeting(kind, mask, where, other);
  }
}

}  // namespace

void meet_warp(const char* kind, unsigned mask, Where where, void* offer, Complete complete) {
  check_meeting(kind, mask, where);
  Warp& warp = current_warp();
  current().mask = mask;
  current().offer = offer;
  warp.waiting |= current_bit();
  if ((warp.waiting & mask) != mask) return stop(Thread::kInWarpMeeting, kind, where);

  void* offers[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& thread = *threads[place.thread / kWarp * kWarp + lane];
    offers[lane] = thread.offer;
    thread.state = Thread::kReady;
  }
  warp.waiting &= ~mask;
  warp.ready |= mask;
  // Only a barrier makes what its lanes wrote visible to one another; an exchange of values is no
  // barrier, though on most hardware it looks like one.
  if (complete == nullptr) {
    met_in_warp(place.thread / kWarp, mask);
  } else {
    complete(offers, mask);
  }
}

void meet_warpgroup(const char* kind, Where where, void* offer, void (*complete)(void* const* offers)) {
  const int first = place.thread / kWarpgroup * kWarpgroup;
  if (first + kWarpgroup > place.threads) fail("%s in a warpgroup that is not whole", kind);
  for (int warp = first / kWarp; warp < (first + kWarpgroup) / kWarp; ++warp) {
    if (warps[warp].exited != 0)
      fail("%s at %s waits for thread %d, which exited", kind, text_of(where).c_str(),
           warp * kWarp + std::countr_zero(warps[warp].exited));
  }
  Meeting& meeting = meetings[place.thread / kWarpgroup];
  if (meeting.waiting == 0) {
    meeting.first = place.thread;
  } else if (const Thread& other = *threads[meeting.first];
             strcmp(other.kind, kind) != 0 || !same(other.where, where)) {
    fail("%s at %s, while thread %d of the warpgroup waits in %s at %s", kind, text_of(where).c_str(),
         meeting.first, other.kind, text_of(other.where).c_str());
  }
  meeting.offers[place.thread - first] = offer;
  if (++meeting.waiting < kWarpgroup) return stop(Thread::kWaiting, kind, where);
  meeting.waiting = 0;
  for (int thread = first; thread < first + kWarpgroup; ++thread) set_ready(thread);
  complete(meeting.offers);
}

namespace {

// The running thread comes to a numbered barrier; whether it is the last.
bool come_to(const char* kind, int number, int expected) {
  if (number < 1 || number >= kNumbered) fail("%s with barrier %d, expected 1 ... 15", kind, number);
  if (expected <= 0 || expected % kWarp != 0 || expected > place.of_block)
    fail("%s with %d threads, expected a multiple of 32, at most those of the block", kind, expected);
  Numbered& barrier = numbered[rank()][number];
  if (barrier.came == 0) barrier.expected = expected;
  if (barrier.expected != expected)
    fail("%s with %d threads at barrier %d, where others expect %d", kind, expected, number,
         barrier.expected);
  barrier.clock.release();
  if (++barrier.came < expected) return false;
  barrier.came = 0;
  for (const int thread : barrier.waiting) {
    barrier.clock.acquire(thread);
    set_ready(thread);
  }
  barrier.waiting.clear();
  return true;
}

std::string missing_at(const void* at) {
  const auto& barrier = *static_cast<const Numbered*>(at);
  return std::to_string(barrier.expected - barrier.came) + " more threads at barrier " +
         std::to_string((&barrier - numbered[0]) % kNumbered);
}

}  // namespace

void sync_threads(int number, int expected, Where where) {
  Numbered& barrier = numbered[rank()][number % kNumbered];
  if (!come_to("sync_threads", number, expected)) {
    barrier.waiting.push_back(place.thread);
    return wait_for("sync_threads", where, &barrier, missing_at);
  }
  barrier.clock.acquire(place.thread);
  barrier.clock.clear();
}

void arrive_threads(int number, int expected) {
  if (come_to("arrive_threads", number, expected)) numbered[rank()][number].clock.clear();
}

}  // namespace nf::emulation
