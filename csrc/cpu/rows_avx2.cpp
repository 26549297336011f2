// The row kernels for avx2. GCC takes the target before any include, for the whole file; clang takes
// it as an attribute on the functions that follow (rows.inc opens and closes it).
#if defined(__x86_64__) && defined(__clang__)
#define NF_CLANG_TARGET "avx2,fma,f16c"
#elif defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#endif
#define NF_ISA avx2
#define NF_ISA_NAME "avx2"
#define NF_VECTOR_BYTES 32
#include "cpu/rows.inc"
