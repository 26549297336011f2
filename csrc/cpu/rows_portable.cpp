// The row kernels for whatever the compiler targets by default, and the choice among all of them.
#define NF_ISA portable
#define NF_ISA_NAME "portable"
#define NF_VECTOR_BYTES 16
#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

#include "cpu/rows.inc"

namespace nf::cpu {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
bool has_f16c() {  // older compilers do not know it by name
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
}
#endif

RowTable choose() {
  const char* asked = std::getenv("NORMFACE_SIMD");
  const bool at_most_portable = asked != nullptr && std::strcmp(asked, "portable") == 0;
  const bool at_most_avx2 = asked != nullptr && std::strcmp(asked, "avx2") == 0;
#if defined(__x86_64__) && defined(__GNUC__)
  if (!at_most_portable) {
    if (!at_most_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      RowTable table = avx512::make_row_table();
      if (asked == nullptr && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd")) {
        table.isa = "avx512bf16";
        table.pairs = avx512bf16::make_pair_kernels();
      }
      return table;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
      return avx2::make_row_table();
  }
#endif
  (void)at_most_portable, (void)at_most_avx2;
  return portable::make_row_table();
}

}  // namespace

const RowTable& row_table() {
  static const RowTable table = choose();
  return table;
}

template <>
const AccumRows<float>& accum_rows<float>() {
  return row_table().accum_float;
}
template <>
const AccumRows<double>& accum_rows<double>() {
  return row_table().accum_double;
}
}  // namespace nf::cpu
