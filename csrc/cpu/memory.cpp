// Fresh tensors, in huge pages where the system offers them; what the machine's memory is like.
#include "cpu/library.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace nf::cpu {
namespace {

constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
[[maybe_unused]] constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers do not know

void ask_for_huge_pages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t end = begin + size_t(t.numel()) * t.element_size();
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1), last = end & ~(kHugePage - 1);
  // Advice only: where it is refused, small pages serve.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

Tensor fresh(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  Tensor t = allocated(sizes, type, [&] { return torch::stable::empty(sizes, type); });
  ask_for_huge_pages(t);
  return t;
}

Tensor fresh_like(const Tensor& like) {
  Tensor t = allocated(like.sizes(), like.scalar_type(), [&] { return torch::stable::empty_like(like); });
  ask_for_huge_pages(t);
  return t;
}

void fault_in([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + page - 1) & ~(page - 1),
                  last = (address + uintptr_t(bytes)) & ~(page - 1);
  if (last < first + 2 * page) return;
  // The middle page stands for all. Where a kernel does not know one of these calls, it says so and does nothing.
  unsigned char there = 1;
  void* middle = reinterpret_cast<void*>((first + (last - first) / 2) & ~(page - 1));
  if (mincore(middle, page, &there) == 0 && (there & 1) == 0)
    madvise(reinterpret_cast<void*>(first), last - first, kPopulateWrite);
#endif
}

bool is_beyond_caches(const Tensor& t) {
  static const int64_t last_cache = [] {
    int64_t bytes = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (bytes <= 0) bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return bytes > 0 ? bytes : int64_t(1) << 25;  // where the machine does not say
  }();
  return t.numel() * int64_t(t.element_size()) > last_cache;
}

}  // namespace nf::cpu
