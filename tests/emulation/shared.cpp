#include "shared.h"

#include <algorithm>
#include <bit>
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

// Who touched a byte last: some lanes of a warp, the latest of them at `time`, which counts barriers.
struct Touch {
  enum Kind : uint8_t { kPlain, kAtomic, kCopying };  // the last: a copy that has not landed

  uint64_t time = 0;
  unsigned lanes = 0;
  uint8_t warp = 0;
  Kind kind = kPlain;
};
constexpr uint8_t kSeveralWarps = 255;

struct Byte {
  Touch write, read;
};

struct Copy {
  unsigned char* to;
  Bytes16 bytes;
  int group;
};

struct ThreadMemory {
  uint64_t synced[kWarp] = {};  // the last sync_warp of a part of the warp, with each of its lanes
  int open_group = 0;
  std::vector<Copy> copies;
};

alignas(kGap) unsigned char arena[kArena];
Byte bytes_of_arena[kArena];
std::vector<Array> arrays;
size_t bytes_given = 0;

// Time only grows, from launch to launch, so that nothing has to be reset for a new block.
uint64_t now = 1;
uint64_t block_began = 1;
uint64_t block_synced = 1;                  // the last sync_block
uint64_t warp_synced[kMaxThreads / kWarp];  // the last sync_warp of all lanes
ThreadMemory memory_of[kMaxThreads];

uint8_t my_warp() { return static_cast<uint8_t>(place.thread / kWarp); }
unsigned my_lane() { return 1u << place.thread % kWarp; }

Byte& byte_at(const unsigned char* address) { return bytes_of_arena[address - arena]; }

const Array* array_of(const void* address, size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(address);
  for (const Array& array : arrays) {
    if (first >= array.begin && first + bytes <= array.begin + array.bytes) return &array;
  }
  return nullptr;
}

// Whether a barrier stands between that touch and what the running thread does now.
bool happened_before(const Touch& touch) {
  if (touch.kind == Touch::kCopying) return touch.time < block_began;
  if (touch.time < block_synced) return true;
  if (touch.warp != my_warp()) return false;
  if (touch.time < warp_synced[touch.warp]) return true;
  for (unsigned others = touch.lanes & ~my_lane(); others != 0; others &= others - 1) {
    if (touch.time >= memory_of[place.thread].synced[std::countr_zero(others)]) return false;
  }
  return true;
}

void replace(Touch& touch) { touch = {now, my_lane(), my_warp(), Touch::kPlain}; }

// Reads do not mind one another, nor do atomics: there the touch becomes that of all who were not
// parted by a barrier. Whoever was may be forgotten, for whoever comes after us comes after them.
void join(Touch& touch, Touch::Kind kind) {
  if (happened_before(touch)) {
    replace(touch);
  } else {
    if (touch.warp != my_warp()) touch.warp = kSeveralWarps;
    touch.lanes |= my_lane();
    touch.time = now;
  }
  touch.kind = kind;
}

[[noreturn]] void fail_access(const char* does, const unsigned char* address, const char* why) {
  const Array& array = *array_of(address, 1);
  const char* slash = strrchr(array.where.file_name(), '/');
  fail("%s byte %zu of the shared array taken at %s:%u, which %s", does,
       static_cast<size_t>(address - array.begin), slash ? slash + 1 : array.where.file_name(),
       static_cast<unsigned>(array.where.line()), why);
}

[[noreturn]] void fail_race(const char* does, const unsigned char* address, const Touch& other,
                            const char* did) {
  if (other.kind == Touch::kCopying) {
    fail_access(does, address, "an asynchronous copy that nobody waited for is still writing");
  }
  const int thread = other.warp * kWarp + std::countr_zero(other.lanes & ~my_lane());
  const std::string who =
      other.warp == kSeveralWarps ? "several warps" : "thread " + std::to_string(thread);
  fail_access(does, address, (who + " " + did + " with no barrier between").c_str());
}

}  // namespace

void begin_shared(size_t bytes, int threads) {
  block_began = block_synced = ++now;
  for (int thread = 0; thread < threads; ++thread) {
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
  // Who meets takes over what the others know from meetings of their own.
  uint64_t synced[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const ThreadMemory& memory = memory_of[warp * kWarp + lane];
    for (int other = 0; other < kWarp; ++other) {
      const bool here = mask >> other & 1;
      synced[other] = here ? now : std::max(synced[other], memory.synced[other]);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    std::copy_n(synced, kWarp, memory_of[warp * kWarp + lane].synced);
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
    const bool both_atomic = access == Access::kAtomic && byte.write.kind == Touch::kAtomic;
    if (!both_atomic && !happened_before(byte.write)) fail_race(does, at, byte.write, "wrote");
    if (access == Access::kRead) {
      if (byte.write.time < block_began) fail_access(does, at, "nobody wrote");
      join(byte.read, Touch::kPlain);
      continue;
    }
    if (!happened_before(byte.read)) fail_race(does, at, byte.read, "read");
    if (access == Access::kAtomic) {
      join(byte.write, Touch::kAtomic);
    } else {
      replace(byte.write);
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
  if (!is_shared(to, sizeof(bytes)))
    fail("copy_async_16 to %p, which is not shared memory", shared);
  check_access(to, sizeof(bytes), Access::kWrite);
  memset(to, 0xff, sizeof(bytes));
  for (size_t i = 0; i < sizeof(bytes); ++i) byte_at(to + i).write.kind = Touch::kCopying;
  ThreadMemory& mine = memory_of[place.thread];
  mine.copies.push_back({to, bytes, mine.open_group});
}

void commit_copies() { memory_of[place.thread].open_group += 1; }

void land_copies(int groups_left_in_flight) {
  ThreadMemory& mine = memory_of[place.thread];
  std::erase_if(mine.copies, [&](const Copy& copy) {
    if (copy.group >= mine.open_group - groups_left_in_flight) return false;
    memcpy(copy.to, &copy.bytes, sizeof(copy.bytes));
    for (size_t i = 0; i < sizeof(copy.bytes); ++i) replace(byte_at(copy.to + i).write);
    return true;
  });
}

}  // namespace nf::emulation
