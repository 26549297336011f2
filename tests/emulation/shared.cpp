#include "shared.h"

#include <cstring>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace nf::emulation {
namespace {

constexpr size_t kGap = 128;  // between two arrays; a multiple of it keeps every alignment
constexpr int kMaxArrays = 32;
constexpr size_t kArena = kSharedLimit + kMaxArrays * kGap;

struct Array {
  size_t offset, bytes;
  unsigned char* begin;
  Where where;
};

// Who touched a byte last. Time is counted in barriers.
struct Touch {
  uint64_t time : 48;
  uint64_t warp : 8;
  uint64_t lane : 8;
};
constexpr uint64_t kSeveral = 255;  // lanes of a warp, or warps
constexpr uint64_t kAtomic = 254;   // as a warp: an atomic operation
constexpr uint64_t kCopying = 253;  // as a lane: an asynchronous copy that has not landed

struct Byte {
  Touch write, read;
};

struct Copy {
  unsigned char* to;
  Bytes16 bytes;
  int group;
};

struct ThreadMemory {
  // The last sync_warp of this thread that left out a part of its warp.
  unsigned synced_mask = 0;
  uint64_t synced_time = 0;
  int open_group = 0;
  std::vector<Copy> copies;
};

alignas(kGap) unsigned char arena[kArena];
Byte bytes_of_arena[kArena];
std::vector<Array> arrays;
size_t bytes_given = 0;

uint64_t now = 1;
uint64_t block_began = 1;
uint64_t block_synced = 1;               // the last sync_block
uint64_t warp_synced[kMaxThreads / 32];  // the last sync_warp of all lanes
ThreadMemory memory_of[kMaxThreads];

uint64_t my_warp() { return place.thread / kWarp; }
uint64_t my_lane() { return place.thread % kWarp; }

Byte& byte_at(const unsigned char* address) { return bytes_of_arena[address - arena]; }

const Array* array_of(const void* address, size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(address);
  for (const Array& array : arrays) {
    if (first >= array.begin && first + bytes <= array.begin + array.bytes) return &array;
  }
  return nullptr;
}

// Whether a barrier stands between that touch and what the running thread does now.
bool happened_before(Touch touch) {
  if (touch.lane == kCopying) return touch.time < block_began;
  if (touch.time < block_synced) return true;
  if (touch.warp != my_warp()) return false;
  if (touch.lane == my_lane() || touch.time < warp_synced[touch.warp]) return true;
  const ThreadMemory& mine = memory_of[place.thread];
  return touch.lane != kSeveral && (mine.synced_mask >> touch.lane & 1) &&
         touch.time < mine.synced_time;
}

[[noreturn]] void fail_access(const char* does, const unsigned char* address, const char* why) {
  const Array& array = *array_of(address, 1);
  const char* slash = strrchr(array.where.file_name(), '/');
  fail("%s byte %zu of the shared array taken at %s:%u, which %s", does,
       static_cast<size_t>(address - array.begin), slash ? slash + 1 : array.where.file_name(),
       static_cast<unsigned>(array.where.line()), why);
}

[[noreturn]] void fail_race(const char* does, const unsigned char* address, Touch other,
                            const char* did) {
  if (other.lane == kCopying) {
    fail_access(does, address, "an asynchronous copy that nobody waited for is still writing");
  }
  std::string who = "several threads";
  if (other.warp < kAtomic && other.lane < kWarp) {
    who = "thread " + std::to_string(other.warp * kWarp + other.lane);
  }
  fail_access(does, address, (who + " " + did + " with no barrier between").c_str());
}

void note_read(Touch& read) {
  const bool alone = happened_before(read);  // every later writer that minds them minds us as well
  const bool same_warp = read.warp == my_warp();
  read.warp = alone || same_warp ? my_warp() : kSeveral;
  read.lane = alone ? my_lane() : kSeveral;
  read.time = now;
}

}  // namespace

void begin_shared(size_t bytes, int threads) {
  now += 1;
  block_began = block_synced = now;
  for (uint64_t& time : warp_synced) time = 0;
  for (int thread = 0; thread < threads; ++thread) {
    memory_of[thread].synced_mask = 0;
    memory_of[thread].open_group = 0;
    memory_of[thread].copies.clear();
  }
  bytes_given = bytes;
  arrays.clear();
  if (bytes > 0) {
    ASAN_UNPOISON_MEMORY_REGION(arena, kArena);
    memset(arena, 0xff, bytes + kMaxArrays * kGap);
  }
  ASAN_POISON_MEMORY_REGION(arena, kArena);  // until it is taken
}

void met_in_block() { block_synced = ++now; }

void met_in_warp(int warp, unsigned mask) {
  now += 1;
  if (mask == kFullMask) {
    warp_synced[warp] = now;
    return;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    memory_of[warp * kWarp + lane].synced_mask = mask;
    memory_of[warp * kWarp + lane].synced_time = now;
  }
}

unsigned char* take_shared(int index, size_t offset, size_t bytes, Where where) {
  if (bytes > bytes_given || offset > bytes_given - bytes) {
    fail("takes %zu bytes of shared memory after %zu, but the launch gave %zu", bytes, offset,
         bytes_given);
  }
  if (index == kMaxArrays) fail("takes more than %d shared arrays", kMaxArrays);
  if (index == static_cast<int>(arrays.size())) {
    unsigned char* const begin = arena + offset + kGap * index;
    ASAN_UNPOISON_MEMORY_REGION(begin, bytes);
    arrays.push_back({offset, bytes, begin, where});
  }
  const Array& array = arrays[index];
  if (array.offset != offset || array.bytes != bytes) {
    fail("takes %zu bytes after %zu as shared array %d, but another thread took %zu after %zu",
         bytes, offset, index, array.bytes, array.offset);
  }
  return array.begin;
}

bool is_shared(const void* address, size_t bytes) { return array_of(address, bytes) != nullptr; }

void check_access(const void* address, size_t bytes, Access access) {
  const auto* first = static_cast<const unsigned char*>(address);
  if (first < arena || first >= arena + kArena || !in_kernel()) return;
  const char* does = access == Access::kRead ? "reads" : "writes";
  if (!is_shared(address, bytes)) {
    fail("%s %zu bytes of shared memory that are not all in one array", does, bytes);
  }
  for (const unsigned char* at = first; at < first + bytes; ++at) {
    Byte& byte = byte_at(at);
    const bool both_atomic = access == Access::kAtomic && byte.write.warp == kAtomic;
    if (!both_atomic && !happened_before(byte.write)) fail_race(does, at, byte.write, "wrote");
    if (access == Access::kRead) {
      if (byte.write.time < block_began) fail_access(does, at, "nobody wrote");
      note_read(byte.read);
    } else {
      if (!happened_before(byte.read)) fail_race(does, at, byte.read, "read");
      byte.read = {};
      byte.write = {now, access == Access::kAtomic ? kAtomic : my_warp(), my_lane()};
    }
  }
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

void start_copy(void* shared, const Bytes16& bytes) {
  auto* to = static_cast<unsigned char*>(shared);
  if (!is_shared(to, sizeof(bytes))) fail("copy_async_16 to %p, which is not shared memory", shared);
  check_access(to, sizeof(bytes), Access::kWrite);
  memset(to, 0xff, sizeof(bytes));
  for (size_t i = 0; i < sizeof(bytes); ++i) byte_at(to + i).write.lane = kCopying;
  ThreadMemory& mine = memory_of[place.thread];
  mine.copies.push_back({to, bytes, mine.open_group});
}

void commit_copies() { memory_of[place.thread].open_group += 1; }

void land_copies(int groups_left_in_flight) {
  ThreadMemory& mine = memory_of[place.thread];
  std::erase_if(mine.copies, [&](const Copy& copy) {
    if (copy.group >= mine.open_group - groups_left_in_flight) return false;
    memcpy(copy.to, &copy.bytes, sizeof(copy.bytes));
    for (size_t i = 0; i < sizeof(copy.bytes); ++i) {
      byte_at(copy.to + i).write = {now, my_warp(), my_lane()};
    }
    return true;
  });
}

}  // namespace nf::emulation
