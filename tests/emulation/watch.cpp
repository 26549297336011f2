#include "watch.h"

#include <algorithm>
#include <bit>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "clocks.h"
#include "fibre.h"
#include "records.h"
#include "shared.h"
#include "warpgroup.h"

namespace nf::emulation {
namespace {

uint64_t launch_began = 1;

// Blocks run one after another, so a block is a stretch of time: those that have come to each counter, and
// those whose work the running block may rely on.
struct Span {
  uint64_t from, to;
};
std::unordered_map<const unsigned*, std::vector<Span>> came;
std::vector<Span> relied_on;
enum class Arrival { kNone, kEarlier, kLast } arrival = Arrival::kNone;

// Whether a barrier, or the end of a launch, stands between that touch and what the thread
// does now. A block finds nothing of earlier blocks in its shared memory, so there their end counts
// as well: `began` is when the block did, or the launch.
bool happened_before(const Touch& touch, uint64_t began, int thread = place.thread) {
  if (touch.time < began) return true;
  if (touch.warp == kSeveralBlocks) return false;
  if (touch.time < block_began)
    return std::ranges::any_of(relied_on, [&](Span s) { return s.from <= touch.time && touch.time < s.to; });
  return touch.kind != Touch::kCopying && knows(thread, touch);
}

// Neither reads nor atomics mind one another: the touch becomes that of all who were not
// parted by a barrier. Whoever was may be forgotten, for whoever comes after us comes after them.
void join(Touch& touch, uint64_t began, Touch::Kind kind) {
  const Touch mine = touch_by(place.thread);
  if (happened_before(touch, began)) {
    touch = mine;
  } else {
    if (touch.time < block_began) touch.warp = kSeveralBlocks;
    if (touch.warp != mine.warp && touch.warp != kSeveralBlocks) touch.warp = kSeveralWarps;
    touch.lanes |= mine.lanes;
    touch.time = now;
  }
  touch.kind = kind;
}

// One touch stands for those of all other blocks.
bool is_once_too_often(Touch& touch, bool& others) {
  if (touch.time < block_began) touch.warp = kSeveralBlocks;
  return touch.warp == kSeveralBlocks && std::exchange(others, true);
}

// The same where clocks run, which do not part all threads at one time: everybody's own is kept.
void join(Touches& reads, uint64_t began) {
  if (!clocks_run) return join(reads.first, began, Touch::kPlain);
  bool others = false;
  reads.add(touch_by(place.thread),
            [&](Touch& touch) { return happened_before(touch, began) || is_once_too_often(touch, others); });
}

// Whether hooks.cpp tells what threads do.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kThreadsAreWatched = false;
#else
constexpr bool kThreadsAreWatched = true;
#endif

std::string does_to(const char* does, uintptr_t address) {
  return std::string(does) + " " + name_of(address) + ", which ";
}

[[noreturn]] void fail_race(const char* does, uintptr_t address, const Touch& other, const char* did) {
  const std::string what = does_to(does, address);
  if (other.kind == Touch::kCopying) {
    fail("%san asynchronous copy that nobody waited for is still writing", what.c_str());
  }
  if (other.time < block_began || other.warp == kSeveralBlocks) {
    fail("%sanother block of the launch %s", what.c_str(), did);
  }
  if (other.warp == kSeveralWarps) {
    fail("%sseveral warps %s with no barrier between", what.c_str(), did);
  }
  if (is_of_agent(other)) {
    fail("%s%s %s, and this thread has not waited for that", what.c_str(),
         name_of_agent(other.warp * kWarp + std::countr_zero(other.lanes)).c_str(), did);
  }
  const int lane = place.thread / kWarp == other.warp ? place.thread % kWarp : kWarp;
  const unsigned others = lane < kWarp ? other.lanes & ~(1u << lane) : other.lanes;
  fail("%sthread %d %s with no barrier between", what.c_str(), other.warp * kWarp + std::countr_zero(others),
       did);
}

void check_place(const void* address, size_t bytes, bool shared, const char* does) {
  if (!shared && arrival == Arrival::kEarlier) {
    fail("%s global memory after it came to last_to_arrive, and not as the last", does);
  }
  if (shared && !is_in_one_array(address, bytes)) {
    fail("%s %zu bytes of shared memory that are not all in one array", does, bytes);
  }
}

// Agents see of shared memory what agents wrote, and of ordinary stores those that were fenced.
void check_fenced(int agent, const char* does, const Touch& store, uintptr_t at, int starter) {
  if (store.time < block_began || is_of_agent(store) || sees_fenced(starter, store)) return;
  fail("%s %sthread %d stored with no fence_shared_for_bulk before it met thread %d",
       name_of_agent(agent).c_str(), does_to(does, at).c_str(),
       store.warp * kWarp + std::countr_zero(store.lanes), starter);
}

}  // namespace

void check_access(const void* address, size_t bytes, Access access) {
  if (!in_kernel) return;
  if (is_on_a_stack(address)) {
    if (products_in_flight != 0) check_registers(address);
    return;
  }
  const bool shared = is_shared(address);
  const uint64_t began = shared ? block_began : launch_began;
  const char* does = access == Access::kRead ? "reads" : "writes";
  check_place(address, bytes, shared, does);
  for_each_place(address, bytes, [&](Record& record, uintptr_t at) {
    const bool both_atomic = access == Access::kAtomic && record.write.kind == Touch::kAtomic;
    if (!both_atomic && !happened_before(record.write, began)) {
      fail_race(does, at, record.write, "wrote");
    }
    if (access == Access::kRead) {
      if (shared && record.write.time < block_began) {
        fail("reads %s, which nobody wrote", name_of(at).c_str());
      }
      join(record.read, began);
      return;
    }
    if (const Touch* reader =
            record.read.first_not([&](const Touch& t) { return happened_before(t, began); }))
      fail_race(does, at, *reader, "read");
    if (access == Access::kAtomic) {
      join(record.write, began, Touch::kAtomic);
    } else {
      record.write = touch_by(place.thread);
    }
  });
}

template <class T>
T fetch_add(T* at, T value) {
  check_access(at, sizeof(T), Access::kAtomic);
  const T before = *at;
  *at = before + value;
  return before;
}
template int fetch_add(int*, int);
template unsigned fetch_add(unsigned*, unsigned);
template int64_t fetch_add(int64_t*, int64_t);

void copy_departs(void* to, size_t bytes) {
  check_access(to, bytes, Access::kWrite);
  for_each_place(to, bytes, [](Record& record, uintptr_t) { record.write.kind = Touch::kCopying; });
}

void copy_lands(void* to, size_t bytes) {
  for_each_place(to, bytes, [](Record& record, uintptr_t) { record.write = touch_by(place.thread); });
}

void agent_reads(int agent, const void* from, size_t bytes, const int* starters, int count) {
  const bool shared = is_shared(from);
  const uint64_t began = shared ? block_began : launch_began;
  const auto does = [&] { return name_of_agent(agent) + " reads"; };  // said in an error alone
  check_place(from, bytes, shared, "an agent reads");
  if (!kThreadsAreWatched) return;
  Touch checked{.time = ~uint64_t{0}, .lanes = 0, .warp = 0, .kind = Touch::kPlain};
  for_each_place(from, bytes, [&](Record& record, uintptr_t at) {
    if (record.write != checked) {
      if (shared && record.write.time < block_began) {
        fail("%snobody wrote", does_to(does().c_str(), at).c_str());
      }
      for (int i = 0; i < count; ++i) {
        if (!happened_before(record.write, began, starters[i]))
          fail_race(does().c_str(), at, record.write, "wrote");
        if (shared) check_fenced(agent, "reads", record.write, at, starters[i]);
      }
      // Ordinary stores to global memory would need a fence of their own, which no kernel of ours has.
      if (!shared && record.write.time >= launch_began && !is_of_agent(record.write))
        fail("%sa thread of this launch stored", does_to(does().c_str(), at).c_str());
      checked = record.write;
    }
    bool others = false;
    record.read.add(touch_by(agent), [&](Touch& t) {
      if (t.time < began || is_once_too_often(t, others)) return true;
      return t.warp == agent / kWarp && t.lanes == 1u << agent % kWarp;
    });
  });
}

void agent_writes(int agent, void* to, size_t bytes) {
  const bool shared = is_shared(to);
  const uint64_t began = shared ? block_began : launch_began;
  const auto does = [&] { return name_of_agent(agent) + " writes"; };
  check_place(to, bytes, shared, "an agent writes");
  if (!kThreadsAreWatched) return;
  for_each_place(to, bytes, [&](Record& record, uintptr_t at) {
    if (!happened_before(record.write, began)) fail_race(does().c_str(), at, record.write, "wrote");
    if (shared) check_fenced(agent, "writes", record.write, at, place.thread);
    if (const Touch* reader =
            record.read.first_not([&](const Touch& t) { return happened_before(t, began); }))
      fail_race(does().c_str(), at, *reader, "read");
    record.write = touch_by(agent);
  });
}

void arrive(unsigned* counter, unsigned blocks) {
  const unsigned before = fetch_add(counter, 1u);
  if (before >= blocks) fail("last_to_arrive: block number %u of %u, was the counter 0?", before + 1, blocks);
  std::vector<Span>& all = came[counter];
  all.push_back({block_began, tick()});
  if (before + 1 != all.size()) fail("last_to_arrive: the counter began at %zu", before + 1 - all.size());
  arrival = before + 1 == blocks ? Arrival::kLast : Arrival::kEarlier;
  if (arrival == Arrival::kEarlier) return;
  relied_on = std::move(all);
  came.erase(counter);
  *counter = 0;
}

bool arrived_last() { return arrival == Arrival::kLast; }

void launch_begins() {
  launch_began = tick();
  came.clear();
  forget_records_if_many();
}

void block_begins() {
  clocks_begin();
  relied_on.clear();
  arrival = Arrival::kNone;
}

}  // namespace nf::emulation
