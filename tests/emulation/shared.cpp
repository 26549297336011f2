#include "shared.h"

#include <cstdio>
#include <cstring>
#include <vector>

#include "watch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace nf::emulation {
namespace {

constexpr size_t kGap = 1024;  // between two arrays; a multiple of it keeps every alignment
constexpr int kMaxArrays = 28;
constexpr size_t kArena = kSharedLimit + kMaxArrays * kGap;
static_assert(kArena < 1 << 18, "a descriptor has 18 bits for an address");

struct Array {
  size_t offset, bytes;
  unsigned char* begin;
  Where where;
};

struct Copy {
  unsigned char* to;
  Bytes16 bytes;
  int group;
};

struct Copies {
  int open_group = 0;
  std::vector<Copy> in_flight;
};

alignas(kGap) unsigned char arenas[kMostBlocks][kArena];
static_assert(kArena % kGap == 0);
std::vector<Array> arrays_of[kMostBlocks];
size_t bytes_given = 0;
Copies copies_of[kMaxThreads];

const Array* array_of(const void* address, size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(address);
  for (const std::vector<Array>& arrays : arrays_of)
    for (const Array& array : arrays)
      if (first >= array.begin && first + bytes <= array.begin + array.bytes) return &array;
  return nullptr;
}

}  // namespace

void begin_shared(size_t bytes, int threads) {
  for (int thread = 0; thread < threads; ++thread) {
    copies_of[thread].open_group = 0;
    copies_of[thread].in_flight.clear();
  }
  bytes_given = bytes;
  for (int block = 0; block < kMostBlocks; ++block) {
    unsigned char* const arena = arenas[block];
    arrays_of[block].clear();
    if (bytes > 0 && block * place.of_block < threads) {
      ASAN_UNPOISON_MEMORY_REGION(arena, kArena);
      memset(arena, 0xff, bytes + kMaxArrays * kGap);
    }
    ASAN_POISON_MEMORY_REGION(arena, kArena);  // until it is taken
  }
}

unsigned char* take_shared(int index, size_t offset, size_t bytes, Where where) {
  if (bytes > bytes_given || offset > bytes_given - bytes) {
    fail("takes %zu bytes of shared memory after %zu, but the launch gave %zu", bytes, offset, bytes_given);
  }
  if (index == kMaxArrays) fail("takes more than %d shared arrays", kMaxArrays);
  std::vector<Array>& arrays = arrays_of[rank()];
  if (index == static_cast<int>(arrays.size())) {
    unsigned char* const begin = arenas[rank()] + offset + kGap * index;
    ASAN_UNPOISON_MEMORY_REGION(begin, bytes);
    arrays.push_back({offset, bytes, begin, where});
  }
  const Array& array = arrays[index];
  if (array.offset != offset || array.bytes != bytes) {
    fail("takes %zu bytes after %zu as shared array %d, but another thread took %zu after %zu", bytes, offset,
         index, array.bytes, array.offset);
  }
  return array.begin;
}

unsigned char* in_block(const void* address, int of_rank) {
  if (of_rank < 0 || of_rank * place.of_block >= place.threads)
    fail("block %d of a cluster has none", of_rank);
  return arenas[of_rank] + (static_cast<const unsigned char*>(address) - arenas[rank()]);
}

uint32_t shared_address(const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  if (at < arenas[rank()] || at >= arenas[rank()] + kArena)
    fail("%p is not in shared memory of this block", address);
  return static_cast<uint32_t>(at - arenas[rank()]);
}
unsigned char* at_shared_address(uint32_t address) { return arenas[rank()] + address; }

bool is_shared(const void* address) {
  return address >= arenas[0] && address < arenas[0] + kMostBlocks * kArena;
}

bool is_in_one_array(const void* address, size_t bytes) { return array_of(address, bytes); }

std::string name_of(uintptr_t address) {
  char text[256];
  if (const Array* array = array_of(reinterpret_cast<const void*>(address), 1)) {
    const char* file = array->where.file_name();
    const char* slash = strrchr(file, '/');
    snprintf(text, sizeof(text), "byte %zu of the shared array taken at %s:%u",
             static_cast<size_t>(address - reinterpret_cast<uintptr_t>(array->begin)),
             slash ? slash + 1 : file, static_cast<unsigned>(array->where.line()));
  } else {
    snprintf(text, sizeof(text), "global memory at 0x%zx", static_cast<size_t>(address));
  }
  return text;
}

void start_copy(void* shared, const Bytes16& bytes) {
  if (!is_in_one_array(shared, sizeof(bytes))) {
    fail("copy_async_16 to %p, which is not in a shared array", shared);
  }
  copy_departs(shared, sizeof(bytes));
  memset(shared, 0xff, sizeof(bytes));
  Copies& mine = copies_of[place.thread];
  mine.in_flight.push_back({static_cast<unsigned char*>(shared), bytes, mine.open_group});
}

void commit_copies() { copies_of[place.thread].open_group += 1; }

void land_copies(int groups_left_in_flight) {
  Copies& mine = copies_of[place.thread];
  std::erase_if(mine.in_flight, [&](const Copy& copy) {
    if (copy.group >= mine.open_group - groups_left_in_flight) return false;
    memcpy(copy.to, &copy.bytes, sizeof(copy.bytes));
    copy_lands(copy.to, sizeof(copy.bytes));
    return true;
  });
}

}  // namespace nf::emulation
