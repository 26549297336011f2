#include "mbarrier.h"

#include <algorithm>
#include <bitset>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "clocks.h"
#include "shared.h"
#include "threads.h"
#include "watch.h"

namespace nf::emulation {
namespace {

constexpr unsigned kMostBytes = (1u << 20) - 1;

struct Barrier {
  int count;  // arrivals of a phase
  Touch made;
  int maker;
  bool fenced;
  int agent;  // who writes what its loads bring

  int64_t phase;             // the one that goes on
  int missing;               // arrivals
  int64_t expected, issued;  // bytes
  Clock now_arriving;
  Clock done;  // of the last phase that is over

  struct InFlight {
    Load load;
    int64_t phase;
  };
  std::vector<InFlight> loads;
  struct Waiting {
    int thread;
    unsigned parity;
  };
  std::vector<Waiting> waiting;
  std::vector<int> woken;  // by the last phase, and not yet running
};
std::map<const void*, Barrier> barriers;
std::bitset<kMaxThreads> unheard;  // who has waited and not asked since how it went

Barrier& barrier_at(const char* what, const void* at) {
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail("%s: %p is no barrier, no barrier_init made one", what, at);
  Barrier& barrier = found->second;
  if (!knows(place.thread, barrier.made))
    fail("%s of a barrier that thread %d makes, with no sync_block between", what, barrier.maker);
  if (!barrier.fenced && place.thread != barrier.maker)
    fail("%s of a barrier that thread %d made with no fence_barriers after", what, barrier.maker);
  return barrier;
}

// What waits have let through is there.
void land(Barrier& barrier) {
  std::erase_if(barrier.loads, [&](const Barrier::InFlight& one) {
    if (one.phase >= barrier.phase) return false;
    land_load(one.load);
    return true;
  });
}

bool is_over(const Barrier& barrier, unsigned parity) { return (barrier.phase & 1) != (parity & 1); }

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.missing > 0 || barrier.expected != barrier.issued) return;
  if (!barrier.woken.empty())
    fail("a phase of the barrier ends before thread %d, which waited for the one before, could see that one",
         barrier.woken.front());
  barrier.phase += 1;
  barrier.missing = barrier.count;
  barrier.expected = barrier.issued = 0;
  barrier.done.join(barrier.now_arriving);
  barrier.now_arriving.clear();
  if (!barrier.loads.empty()) barrier.done.give(barrier.agent, tick());
  std::vector<Barrier::Waiting> still;
  for (const Barrier::Waiting& one : barrier.waiting) {
    if (!is_over(barrier, one.parity)) {
      still.push_back(one);
      continue;
    }
    land(barrier);
    barrier.done.acquire(one.thread);
    barrier.woken.push_back(one.thread);
    set_ready(one.thread);
  }
  barrier.waiting = std::move(still);
}

std::string missing_at(const void* at) {
  const auto& [address, barrier] = *static_cast<const std::pair<const void* const, Barrier>*>(at);
  return "phase " + std::to_string(barrier.phase) + " of " + name_of(reinterpret_cast<uintptr_t>(address)) +
         ", where " + std::to_string(barrier.missing) + " of " + std::to_string(barrier.count) +
         " arrivals and " + std::to_string(barrier.expected - barrier.issued) + " of " +
         std::to_string(barrier.expected) + " bytes are missing";
}

}  // namespace

void init_barrier(void* at, int arrivals) {
  if (reinterpret_cast<uintptr_t>(at) % 8 != 0) fail("barrier_init at %p, which is not a multiple of 8", at);
  if (!is_shared(at)) fail("barrier_init at %p, which is not in shared memory", at);
  if (arrivals < 1 || arrivals > 0xfffff) fail("barrier_init with %d arrivals", arrivals);
  if (barriers.contains(at)) fail("barrier_init of a barrier that was made before");
  check_access(at, 8, Access::kWrite);
  Barrier& made = barriers[at];
  made.count = made.missing = arrivals;
  made.maker = place.thread;
  made.made = touch_by(place.thread);
  made.agent = new_agent("a bulk copy to the barrier at " + name_of(reinterpret_cast<uintptr_t>(at)));
}

void fence_made_barriers() {
  for (auto& [at, barrier] : barriers) barrier.fenced |= barrier.maker == place.thread;
}

void arrive_at_barrier(void* at, unsigned bytes) {
  Barrier& barrier = barrier_at(bytes ? "barrier_arrive_expect" : "barrier_arrive", at);
  if (barrier.missing == 0)
    fail("more than %d arrivals in a phase of the barrier at %s", barrier.count,
         name_of(reinterpret_cast<uintptr_t>(at)).c_str());
  barrier.expected += bytes;
  if (barrier.expected > kMostBytes) fail("a barrier cannot expect %ld bytes", long(barrier.expected));
  barrier.now_arriving.release();
  barrier.missing -= 1;
  end_phase_if_complete(barrier);
}

void wait_at_barrier(void* at, unsigned parity, Where where) {
  Barrier& barrier = barrier_at("barrier_wait", at);
  if (parity > 1) fail("barrier_wait for parity %u", parity);
  unheard[place.thread] = true;
  if (is_over(barrier, parity)) {
    land(barrier);
    barrier.done.acquire(place.thread);
    return;
  }
  barrier.waiting.push_back({place.thread, parity});
  wait_for("barrier_wait", where, &*barriers.find(at), missing_at);
  std::erase(barrier.woken, place.thread);
}

void arrive_at_barrier_of(void* at, int of_rank) {
  const int first = of_rank * place.of_block;
  void* const there = in_block(at, of_rank);
  const auto exited = [](const auto& thread) { return thread->state == Thread::kExited; };
  if (std::all_of(threads.begin() + first, threads.begin() + first + place.of_block, exited))
    fail("barrier_arrive_of block %d of the cluster, which has exited", of_rank);
  arrive_at_barrier(there, 0);
}

namespace {

// Bytes may come from another block before they are expected here, within the phase.
void load(const char* kind, void* at, const Load& load, bool from_elsewhere) {
  Barrier& barrier = barrier_at(kind, at);
  if (!barrier.fenced) fail("load_box to a barrier that was made with no fence_barriers after");
  const int64_t bytes = bytes_of(load);
  if (barrier.expected - barrier.issued < bytes && !from_elsewhere)
    fail("load_box of %ld bytes to the barrier at %s, which expects %ld more in this phase", long(bytes),
         name_of(reinterpret_cast<uintptr_t>(at)).c_str(), long(barrier.expected - barrier.issued));
  begin_load(load, barrier.agent);
  barrier.issued += bytes;
  barrier.loads.push_back({load, barrier.phase});
  end_phase_if_complete(barrier);
}

}  // namespace

void load_to_barrier(void* at, const Load& one) { load("load_box", at, one, false); }

void load_to_barriers(void* at, const Load& one) {
  for (int block = 0; block * place.of_block < place.threads; ++block)
    load("load_box_to_all", in_block(at, block), {one.from, one.row, one.column, in_block(one.to, block)},
         block != rank());
}

void hear_of_waits() { unheard[place.thread] = false; }

void barriers_begin() {
  barriers.clear();
  unheard.reset();
}

void barriers_end() {
  if (unheard[place.thread]) fail("exits after a barrier_wait with no barriers_held");
}

}  // namespace nf::emulation
