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

#if defined(__linux__)
bool is_absent(uintptr_t address, uintptr_t page) {
  unsigned char there = 1;
  return mincore(reinterpret_cast<void*>(address), page, &there) == 0 && (there & 1) == 0;
}
#endif

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
  Tensor t = new_tensor(sizes, type, Place(aoti_torch_device_type_cpu(), 0));
  ask_for_huge_pages(t);
  return t;
}

Tensor fresh_like(const Tensor& like) {
  Tensor t = allocated(like.sizes(), like.scalar_type(), [&] { return torch::stable::empty_like(like); });
  ask_for_huge_pages(t);
  return t;
}

void allocate(Block& block) {
  block.allocate([](int64_t bytes) { return fresh({bytes}, ScalarType::Byte); });
}

NewPages::NewPages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__)
  const uintptr_t bytes = uintptr_t(t.numel()) * uintptr_t(t.element_size());
  if (bytes < 2 * kHugePage) return;
  page_ = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr()), end = begin + bytes;
  constexpr uintptr_t kLooks = 8;
  for (uintptr_t k = 0; k < kLooks && !any_; ++k) {
    const uintptr_t address = (begin + bytes / kLooks * k + bytes / kLooks / 2) & ~(page_ - 1);
    any_ = is_absent(address, page_);
    // One huge page is one trap already. Whether the system gives them shows in the other half of this one.
    const uintptr_t huge = address & ~(kHugePage - 1);
    if (any_ && huge >= begin && huge + kHugePage <= end) {
      madvise(reinterpret_cast<void*>(address), page_, kPopulateWrite);
      any_ = is_absent(address ^ (kHugePage / 2), page_);
      return;
    }
  }
#endif
}

void NewPages::ask_for([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) const {
#if defined(__linux__)
  if (!any_) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + page_ - 1) & ~(page_ - 1),
                  last = (address + uintptr_t(bytes)) & ~(page_ - 1);
  // Where a kernel does not know this call it does nothing, and the pages come one by one.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, kPopulateWrite);
#endif
}

int64_t last_cache_bytes() {
  static const int64_t known = [] {
    int64_t bytes = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (bytes <= 0) bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return bytes > 0 ? bytes : int64_t(1) << 25;  // where the machine does not say
  }();
  return known;
}

}  // namespace nf::cpu
