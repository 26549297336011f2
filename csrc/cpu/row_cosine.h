// The cosine of two stored rows to the last digits: products and sums in double, from the raw rows. Squares of
// float64 rows may leave the range of double; math/normalize.h tames such a row.
#pragma once

#include <vector>

#include "cpu/library.h"

namespace nf::cpu {

template <class T>
class RowCosine {
 public:
  RowCosine(const Rows<T>& x, const Rows<T>& w, double eps) : x_(x), w_(w), eps_(eps) {}

  double operator()(int64_t i, int64_t j) const {
    std::vector<T> memory;
    const T *a = wide(x_, i, memory), *b = wide(w_, j, memory);
    const auto plain = accum_rows<T>().products(a, b, x_.length);
    const double a_tamer = math::norm_tamer(2, plain.aa, eps_), b_tamer = math::norm_tamer(2, plain.bb, eps_);
    if (a_tamer != 1.0 || b_tamer != 1.0) return tamed(a, a_tamer, b, b_tamer);
    const double a_norm = math::row_scale(2, eps_, 1.0, plain.aa).norm;
    return plain.ab / a_norm / math::row_scale(2, eps_, 1.0, plain.bb).norm;
  }

 private:
  // Row i in T: where it lies, or converted into room for two rows.
  const T* wide(const Rows<T>& rows, int64_t i, std::vector<T>& memory) const {
    if (rows.kernel.item == sizeof(T)) return static_cast<const T*>(rows.row(i));
    memory.reserve(size_t(2 * rows.length));
    memory.resize(memory.size() + size_t(rows.length));
    T* into = memory.data() + memory.size() - size_t(rows.length);
    rows.kernel.widen(rows.row(i), rows.length, T(1), into);
    return into;
  }

  double tamed(const T* a, double a_tamer, const T* b, double b_tamer) const {
    double aa = 0, bb = 0, ab = 0;
    for (int64_t d = 0; d < x_.length; ++d) {
      const double of_a = double(a[d]) * a_tamer, of_b = double(b[d]) * b_tamer;
      aa += of_a * of_a, bb += of_b * of_b, ab += of_a * of_b;
    }
    return ab * math::row_scale(2, eps_, a_tamer, aa).inner * math::row_scale(2, eps_, b_tamer, bb).inner;
  }

  const Rows<T>&x_, &w_;
  double eps_;
};

}  // namespace nf::cpu
