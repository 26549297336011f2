#include "watch.h"

#include <algorithm>
#include <bit>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "fibre.h"
#include "shared.h"

namespace nf::emulation {
namespace {

// The last to touch a place: some lanes of a warp, the latest of them at `time`, which counts barriers.
struct Touch {
  enum Kind : uint8_t { kPlain, kAtomic, kCopying };  // the last: a copy that has not landed

  uint64_t time;
  unsigned lanes;
  uint8_t warp;
  Kind kind;
};
constexpr uint8_t kSeveralWarps = 255;
constexpr uint8_t kSeveralBlocks = 254;

// One place is two bytes, the smallest number that kernels compute with. (Two threads that write
// neighbouring single bytes would be accused wrongly.)
constexpr size_t kPlace = 2;
struct Record {
  Touch write, read;
};

// Time only grows, from launch to launch, so that nothing has to be reset.
uint64_t now = 1;
uint64_t launch_began = 1;
uint64_t block_began = 1;
uint64_t block_synced = 1;                                 // the last sync_block
uint64_t warp_synced[kMaxThreads / kWarp];                 // the last sync_warp of all lanes
uint64_t lanes_synced[kMaxThreads / kWarp][kWarp][kWarp];  // the last of fewer, for each pair of lanes

// Blocks run one after another, so a block is a stretch of time: those that have come to each counter, and
// those whose work the running block may rely on.
struct Span {
  uint64_t from, to;
};
std::unordered_map<const unsigned*, std::vector<Span>> came;
std::vector<Span> relied_on;
enum class Arrival { kNone, kEarlier, kLast } arrival = Arrival::kNone;

uint8_t my_warp() { return static_cast<uint8_t>(place.thread / kWarp); }
unsigned my_lane() { return 1u << place.thread % kWarp; }

// The records of memory, page by page, for as much of it as kernels have touched.
constexpr size_t kPage = 4096;
constexpr size_t kMostPages = 4096;  // records take 16 times the memory they describe
std::unordered_map<uintptr_t, std::unique_ptr<Record[]>> pages;

struct Recent {
  uintptr_t page;
  Record* records;
};
Recent recent[64];

Record& record_at(uintptr_t address) {
  const uintptr_t page = address / kPage;
  Recent& entry = recent[page % std::size(recent)];
  if (entry.page != page) {
    std::unique_ptr<Record[]>& records = pages[page];
    if (!records) records = std::make_unique<Record[]>(kPage / kPlace);
    entry = {page, records.get()};
  }
  return entry.records[address % kPage / kPlace];
}

// Calls visit(record, its address) for every place of a stretch of memory.
template <class Visit>
void for_each_place(const void* from, size_t bytes, const Visit& visit) {
  const auto first = reinterpret_cast<uintptr_t>(from);
  for (uintptr_t at = first; at < first + bytes; at += kPlace) visit(record_at(at), at);
}

// Whether a barrier, or the end of a launch, stands between that touch and what the running thread
// does now. A block finds nothing of earlier blocks in its shared memory, so there their end counts
// as well: `began` is when the block did, or the launch.
bool happened_before(const Touch& touch, uint64_t began) {
  if (touch.time < began) return true;
  if (touch.warp == kSeveralBlocks) return false;
  if (touch.time < block_began)
    return std::ranges::any_of(relied_on, [&](Span s) { return s.from <= touch.time && touch.time < s.to; });
  if (touch.kind == Touch::kCopying) return false;
  if (touch.time < block_synced) return true;
  if (touch.warp != my_warp()) return false;
  if (touch.time < warp_synced[touch.warp]) return true;
  const auto& synced = lanes_synced[my_warp()][place.thread % kWarp];
  for (unsigned others = touch.lanes & ~my_lane(); others != 0; others &= others - 1) {
    if (touch.time >= synced[std::countr_zero(others)]) return false;
  }
  return true;
}

void replace(Touch& touch) { touch = {now, my_lane(), my_warp(), Touch::kPlain}; }

// Reads do not mind one another, nor do atomics: there the touch becomes that of all who were not
// parted by a barrier. Whoever was may be forgotten, for whoever comes after us comes after them.
void join(Touch& touch, uint64_t began, Touch::Kind kind) {
  if (happened_before(touch, began)) {
    replace(touch);
  } else {
    if (touch.time < block_began) touch.warp = kSeveralBlocks;
    if (touch.warp != my_warp() && touch.warp != kSeveralBlocks) touch.warp = kSeveralWarps;
    touch.lanes |= my_lane();
    touch.time = now;
  }
  touch.kind = kind;
}

[[noreturn]] void fail_race(const char* does, uintptr_t address, const Touch& other, const char* did) {
  const std::string what = std::string(does) + " " + name_of(address) + ", which ";
  if (other.kind == Touch::kCopying) {
    fail("%san asynchronous copy that nobody waited for is still writing", what.c_str());
  }
  if (other.time < block_began || other.warp == kSeveralBlocks) {
    fail("%sanother block of the launch %s", what.c_str(), did);
  }
  if (other.warp == kSeveralWarps) {
    fail("%sseveral warps %s with no barrier between", what.c_str(), did);
  }
  fail("%sthread %d %s with no barrier between", what.c_str(),
       other.warp * kWarp + std::countr_zero(other.lanes & ~my_lane()), did);
}

}  // namespace

void check_access(const void* address, size_t bytes, Access access) {
  if (!in_kernel || is_on_a_stack(address)) return;
  const bool shared = is_shared(address);
  const uint64_t began = shared ? block_began : launch_began;
  const char* does = access == Access::kRead ? "reads" : "writes";
  if (!shared && arrival == Arrival::kEarlier) {
    fail("%s global memory after it came to last_to_arrive, and not as the last", does);
  }
  if (shared && !is_in_one_array(address, bytes)) {
    fail("%s %zu bytes of shared memory that are not all in one array", does, bytes);
  }
  for_each_place(address, bytes, [&](Record& record, uintptr_t at) {
    const bool both_atomic = access == Access::kAtomic && record.write.kind == Touch::kAtomic;
    if (!both_atomic && !happened_before(record.write, began)) {
      fail_race(does, at, record.write, "wrote");
    }
    if (access == Access::kRead) {
      if (shared && record.write.time < block_began) {
        fail("reads %s, which nobody wrote", name_of(at).c_str());
      }
      join(record.read, began, Touch::kPlain);
      return;
    }
    if (!happened_before(record.read, began)) fail_race(does, at, record.read, "read");
    if (access == Access::kAtomic) {
      join(record.write, began, Touch::kAtomic);
    } else {
      replace(record.write);
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
  for_each_place(to, bytes, [](Record& record, uintptr_t) { replace(record.write); });
}

void arrive(unsigned* counter, unsigned blocks) {
  const unsigned before = fetch_add(counter, 1u);
  if (before >= blocks) fail("last_to_arrive: block number %u of %u, was the counter 0?", before + 1, blocks);
  std::vector<Span>& all = came[counter];
  all.push_back({block_began, ++now});
  if (before + 1 != all.size()) fail("last_to_arrive: the counter began at %zu", before + 1 - all.size());
  arrival = before + 1 == blocks ? Arrival::kLast : Arrival::kEarlier;
  if (arrival == Arrival::kEarlier) return;
  relied_on = std::move(all);
  came.erase(counter);
  *counter = 0;
}

bool arrived_last() { return arrival == Arrival::kLast; }

void launch_begins() {
  launch_began = ++now;
  came.clear();
  if (pages.size() > kMostPages) {
    pages.clear();
    std::fill(std::begin(recent), std::end(recent), Recent{});
  }
}

void block_begins() {
  block_began = block_synced = ++now;
  relied_on.clear();
  arrival = Arrival::kNone;
}

void met_in_block() { block_synced = ++now; }

void met_in_warp(int warp, unsigned mask) {
  now += 1;
  if (mask == kFullMask) {
    warp_synced[warp] = now;
    return;
  }
  // Who meets takes over what the others know from meetings of their own.
  uint64_t synced[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (int other = 0; other < kWarp; ++other) {
      const bool here = mask >> other & 1;
      synced[other] = here ? now : std::max(synced[other], lanes_synced[warp][lane][other]);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) std::copy_n(synced, kWarp, lanes_synced[warp][lane]);
  }
}

}  // namespace nf::emulation
