// Where the compiler's instrumentation of the kernels ends up, instead of in a sanitizer's library.
//
// -fsanitize=thread calls __tsan_… before each load and store, and in place of each atomic (there
// are some in PyTorch's headers, in code around the kernels). -fsanitize=undefined calls
// __ubsan_handle_… where arithmetic went wrong.
#include <cstdio>
#include <cstdlib>

#include "watch.h"

using nf::emulation::Access;
using nf::emulation::check_access;

extern "C" {

void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}

#define ACCESS(bytes)                                                                     \
  void __tsan_read##bytes(void* at) { check_access(at, bytes, Access::kRead); }           \
  void __tsan_write##bytes(void* at) { check_access(at, bytes, Access::kWrite); }         \
  void __tsan_unaligned_read##bytes(void* at) { check_access(at, bytes, Access::kRead); } \
  void __tsan_unaligned_write##bytes(void* at) { check_access(at, bytes, Access::kWrite); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
#undef ACCESS
void __tsan_read_range(void* at, size_t bytes) { check_access(at, bytes, Access::kRead); }
void __tsan_write_range(void* at, size_t bytes) { check_access(at, bytes, Access::kWrite); }

// The atomics that host code around the kernels comes with: reference counts, and the guards of
// function-level statics. Should another be needed, the linker will name it.
int32_t __tsan_atomic32_fetch_add(volatile int32_t* at, int32_t value, int) {
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
int8_t __tsan_atomic8_load(const volatile int8_t* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }

// What went wrong where; every handler's first argument begins so.
struct Incident {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] static void report(const Incident* at, const char* what) {
  if (nf::emulation::in_kernel) nf::emulation::fail("%s at %s:%u", what, at->file, at->line);
  fprintf(stderr, "%s:%u: %s\n", at->file, at->line, what);
  abort();
}

#define HANDLER(name, what) \
  void __ubsan_handle_##name(const Incident* at) { report(at, what); }
HANDLER(add_overflow, "integer overflow")
HANDLER(sub_overflow, "integer overflow")
HANDLER(mul_overflow, "integer overflow")
HANDLER(negate_overflow, "integer overflow")
HANDLER(divrem_overflow, "integer division by zero or overflow")
HANDLER(shift_out_of_bounds, "shift by too many bits")
HANDLER(out_of_bounds, "index outside the array")
#undef HANDLER

}  // extern "C"
