// Fresh tensors, in huge pages where the system offers them; what the machine's memory is like.
#include <cstdlib>
#include <fstream>
#include <string>

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

struct CacheLevel {
  int64_t bytes;
  int64_t processors;  // that share one
};

// The number of processors in a list such as "0-7,64-71", 0 where there is none.
[[maybe_unused]] int64_t count_listed(const char* list) {
  int64_t count = 0;
  for (char* end = nullptr; *list != '\0'; list = end) {
    const long first = std::strtol(list, &end, 10);
    if (end == list) break;
    const long last = *end == '-' ? std::strtol(end + 1, &end, 10) : first;
    count += last - first + 1;
    end += *end == ',';
  }
  return count;
}

// The system's own description: what sysconf says of an AMD's last cache is the sum over the whole package, whose
// greater part belongs to other processors.
CacheLevel last_cache() {
  CacheLevel found{int64_t(1) << 25, int64_t(1) << 20};  // where the machine does not say
#if defined(__linux__)
  for (int index = 0; index < 8; ++index) {  // the last one described is the last level
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    std::string kib, sharers;
    std::getline(std::ifstream(folder + "size"), kib);
    std::getline(std::ifstream(folder + "shared_cpu_list"), sharers);
    const int64_t bytes = 1024 * std::strtoll(kib.c_str(), nullptr, 10),
                  count = count_listed(sharers.c_str());
    if (bytes > 0 && count > 0) found = {bytes, count};
  }
#endif
  return found;
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
    any_ = found_ = is_absent(address, page_);
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
  static const CacheLevel known = last_cache();
  const int64_t instances = (thread_count() + known.processors - 1) / known.processors;
  return known.bytes * std::max<int64_t>(1, instances);
}

}  // namespace nf::cpu
