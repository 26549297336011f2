// The row kernels for avx512. GCC takes the target before any include, for the whole file; clang takes
// it as an attribute on the functions that follow (rows.inc opens and closes it).
#if defined(__x86_64__) && defined(__clang__)
#define NF_CLANG_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#elif defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define NF_ISA avx512
#define NF_ISA_NAME "avx512"
#define NF_VECTOR_BYTES 64
#include "cpu/rows.inc"
