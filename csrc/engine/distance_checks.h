// Argument checks of inner_distance and pair_distance, for CPU and CUDA.
#pragma once

#include <optional>

#include "checks.h"

namespace nf {

// Which cells of an [N, C] matrix are near: a bit each, every row in words of its own.
constexpr int64_t kNearBits = 32;
inline int64_t near_words(int64_t classes) { return (classes + kNearBits - 1) / kNearBits; }

inline void check_distance_order(const char* op, int64_t p) {
  if (p != 1 && p != 2) fail(op, ": expected `p` to be 1 or 2, got ", p);
}

inline void check_distance(const char* op, const Tensor& x, const Tensor& weight, int64_t p) {
  check_head(op, x, weight);
  check_distance_order(op, p);
}

inline void check_distance_backward(const char* op, const Tensor& grad, const Tensor& near, const Tensor& x,
                                    const Tensor& weight, const std::optional<Tensor>& labels, int64_t p) {
  check_distance(op, x, weight, p);
  check_exact(op, "grad", grad, x.scalar_type(), {x.size(0), weight.size(0)});
  if (p == 2) {
    check_shape(op, "near", near, x.size(0), near_words(weight.size(0)));
    if (near.scalar_type() != ScalarType::Int || !near.is_contiguous())
      fail(op, ": expected `near` to be contiguous int32, got ", name_of(near.scalar_type()));
  }
  if (labels) check_labels(op, *labels, x.size(0));
}

inline void check_pair(const char* op, const Tensor& a, const Tensor& b, int64_t p) {
  check_matrix(op, "a", a);
  check_matrix(op, "b", b);
  check_shape(op, "b", b, a.size(0), a.size(1));
  if (accumulator(a.scalar_type()) != accumulator(b.scalar_type()))
    fail(op, ": expected `a` and `b` to be both float64 or both not, got ", name_of(a.scalar_type()), " and ",
         name_of(b.scalar_type()));
  check_distance_order(op, p);
}

inline void check_pair_backward(const char* op, const Tensor& grad, const Tensor& a, const Tensor& b,
                                int64_t p) {
  check_pair(op, a, b, p);
  check_exact(op, "grad", grad, accumulator(a.scalar_type()), {a.size(0)});
}

}  // namespace nf
