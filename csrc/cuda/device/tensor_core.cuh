// d[16, 8] += a[16, 16] · b[16, 8], computed by one warp on its tensor cores: 16-bit factors, float
// sums. Needs compute capability 8.0 (Queue::architecture() >= 80); older devices trap.
//
// The matrices lie spread over the registers of the 32 lanes. With g = lane / 4 and t = lane % 4,
// each 32-bit register holding two neighbours (lower column, or row for b, in the lower half):
//
//   a[0]  row g      columns 2t, 2t+1        a[2]  row g      columns 2t+8, 2t+9
//   a[1]  row g + 8  columns 2t, 2t+1        a[3]  row g + 8  columns 2t+8, 2t+9
//   b[0]  rows 2t, 2t+1      column g        b[1]  rows 2t+8, 2t+9      column g
//   d[0], d[1]  row g  columns 2t, 2t+1      d[2], d[3]  row g + 8  columns 2t, 2t+1
#pragma once

#include <device/launch.cuh>

namespace nf {

NF_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

NF_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// d[16, 8] = a[16, 8] · b[8, 8] + c[16, 8]: factors of tf32, whose 19 bits are the upper ones of a float; the lower 13
// of a register are not read. d and c lie as above, and may be the same. The factors:
//
//   a[0]  row g      column t        a[2]  row g      column t+4
//   a[1]  row g + 8  column t        a[3]  row g + 8  column t+4
//   b[0]  row t      column g        b[1]  row t+4    column g
//
// Products are exact; they and c are cut off, not rounded, where the largest of them has its 24th bit after the
// leading one, and so is the sum (tests/emulation/device/tensor_core.cuh).
NF_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
#else
  __trap();
#endif
}

// Four 8 x 8 matrices of 16-bit values from shared memory into one register each, laid out as the
// fragments above: register m of a lane holds row g, columns 2t and 2t+1 of matrix m. Lane 8m + i
// passes the address of row i of matrix m: 16 bytes, at a multiple of 16. Of 32-bit values a row has
// four, and register m of a lane holds row g, column t.
NF_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* shared_row) {
#if __CUDA_ARCH__ >= 750
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#else
  __trap();
#endif
}

// The same, each matrix transposed on the way: register m holds rows 2t and 2t+1 of column g.
NF_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row) {
#if __CUDA_ARCH__ >= 750
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#else
  __trap();
#endif
}

}  // namespace nf
