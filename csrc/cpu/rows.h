// Everything the CPU kernels do to one row, as function pointers chosen once for the machine's ISA.
// rows.inc, with what it includes, is the only source; rows_portable/avx2/avx512.cpp compile it for their target.
#pragma once

#include <cstdint>

#include "cpu/pairs.h"
#include "cpu/stored.h"
#include "engine/terms.h"
#include "math/normalize.h"
#include "math/update.h"

namespace nf::cpu {

// Rows of the accumulator type T (float or double).
template <class T>
struct AccumRows {
  struct Sums {
    double value;
    double second;
  };
  // Cosines -> coefficients of a term in place, c[j], j < n; returns the sums of its values.
  using Fold = Sums (*)(T* c, int64_t n, const math::TermRow<T>& row, const double* numbers);
  Fold fold[kTerms];
  // The largest s f(c[j]) of a softmax's term, null for the others; -inf for n = 0.
  using Largest = T (*)(const T* c, int64_t n, const math::TermRow<T>& row, const double* numbers);
  Largest largest[kTerms];
  // The places first + j of the c[j] != 0, NaN included, in order, and those c[j]; returns how many. One more
  // than that is written to.
  int64_t (*collect)(const T* c, int64_t n, int64_t first, int64_t* places, T* values);
  // The first place of the largest c[j] beyond `above`, NaN being the largest of all; -1 where there is none.
  int64_t (*place_of_largest)(const T* c, int64_t n, T above);
  // best[j] = the largest of the cosines c[k n + j], k < centers, by math/centers.h.
  void (*pool)(const T* c, int64_t n, int64_t centers, T* best);
  // value[j] in the place of that cosine of class j which is best[j], and 0 in those of the others.
  void (*spread)(T* c, int64_t n, int64_t centers, const T* best, const T* value);
  double (*dot)(const T* a, const T* b, int64_t n);
  // Products and sums in double.
  struct Products {
    double aa, bb, ab;
  };
  Products (*products)(const T* a, const T* b, int64_t n);
  // y += a x
  void (*axpy)(T a, const T* x, T* y, int64_t n);
  // The p-distance of two rows.
  double (*distance)(const T* a, const T* b, int64_t n, int p);
  // y += factor * the slope of that distance with respect to a
  void (*add_distance_slope)(T factor, const T* a, const T* b, T* y, int64_t n, int p);
};

// The most columns of a channel axis that are worked on at once.
constexpr int64_t kColumns = 1024;

// What the elements of a column have in common in vjp: 1 / ||x||, <y, g>, dL/dn, and what a gradient is held within.
template <class T>
struct ColumnNumbers {
  alignas(64) T inverse_norm[kColumns];
  alignas(64) T along[kColumns];
  alignas(64) T g_norm[kColumns];
  alignas(64) T bound[kColumns];
};

// Rows in storage, computed in T: float for float32, float16 and bfloat16, double for float64. The
// storage type is erased, so that what is built on these is compiled once per T.
template <class T>
struct StoredRows {
  int64_t item;  // bytes of one element
  // y = x / ||x|| and the norm of `rows` contiguous rows of n; y is stored like x, past the caches if so asked.
  void (*normalize)(const void* x, int64_t rows, int64_t n, int p, T eps, void* y, T* norms,
                    bool past_caches);
  // The same of one row into the accumulator type; returns how.
  math::RowScale<T> (*normalize_wide)(const void* x, int64_t n, int p, T eps, T* y);
  // dx of such rows from x, its norms, g = dL/dy and g_norms = dL/dn (may be null: zero).
  void (*vjp)(const void* x, const void* g, int64_t rows, int64_t n, int p, T eps, const T* norms,
              const T* g_norms, void* dx, bool past_caches);
  // out = factor / ||x|| (g - y <y, g>), y = x / ||x|| given wide: the tangent projection. Where eps rules
  // the norm it is held within +-largest_gradient, see math::ruled_by_eps.
  void (*project)(const T* y, const T* g, int64_t n, T factor, const math::RowScale<T>& scale, T eps,
                  void* out);
  // The same of a row in storage whose 1 / ||x|| is known and serves (math::inverse_serves), with a factor of 1.
  void (*project_stored)(const void* x, const T* g, int64_t n, T inverse, T eps, void* out);
  // A channel axis: `columns` neighbouring rows whose element d lies `stride` after element d - 1.
  // sums[c] = the p-norm's terms of column c, or sum of x g where g is given. columns <= kColumns.
  void (*column_sums)(const void* x, const void* g, int64_t n, int64_t stride, int64_t columns, int p,
                      T* sums);
  // y = x factor[c], past the caches if so asked.
  void (*column_scale)(const void* x, int64_t n, int64_t stride, int64_t columns, const T* factor, void* y,
                       bool past_caches);
  // vjp of every column.
  void (*column_vjp)(const void* x, const void* g, int64_t n, int64_t stride, int64_t columns, int p,
                     const ColumnNumbers<T>& of, void* dx, bool past_caches);
  // The largest gradient an eps-ruled row may get; infinite but for float16.
  T largest_gradient;
  // y += the sum over k < count of factors[k] times the row of n elements at places[k].
  void (*add_rows)(const void* rows, const int64_t* places, const T* factors, int64_t count, int64_t n, T* y);
  // y = factor x, to and from the accumulator type.
  void (*widen)(const void* x, int64_t n, T factor, T* y);
  void (*store_as)(const T* x, int64_t n, T factor, void* y);
  // A row g of a gradient into the weight's row w and its states (math/update.h); null where a rule has none.
  void (*update)(int64_t update, const math::UpdateNumbers& numbers, const void* g, void* w, void* state1,
                 void* state2, int64_t n);
};

struct RowTable {
  const char* isa;
  AccumRows<float> accum_float;
  AccumRows<double> accum_double;
  StoredRows<float> float32;
  StoredRows<float> float16;
  StoredRows<float> bfloat16;
  StoredRows<double> float64;
  // Null where the processor has no such instructions, or is none of AMD's: on others they were not measured, and
  // need not be faster than float32's.
  const PairKernels* pairs = nullptr;
};

// The best the machine has; NORMFACE_SIMD=portable|avx2|avx512 asks for less, avx512 for no products of pairs.
const RowTable& row_table();

template <class T>
const AccumRows<T>& accum_rows();

namespace portable {
RowTable make_row_table();
}
namespace avx2 {
RowTable make_row_table();
}
namespace avx512 {
RowTable make_row_table();
}

}  // namespace nf::cpu
