// Fresh tensors, in huge pages where the system offers them.
#include "cpu/library.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nf::cpu {
namespace {

constexpr uintptr_t kHugePage = uintptr_t(1) << 21;

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

}  // namespace nf::cpu
