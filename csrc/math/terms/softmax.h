// The softmax's term: E = exp(s c - kappa), S = sum E, A = sum E c. math/softmax.h says what becomes of them.
#pragma once

#include "math/terms/term.h"

namespace nf::math {

template <class T>
struct SoftmaxTerm {
  static constexpr bool kSoftmax = true, kThreshold = false;
  static constexpr int kNumbers = 0;
  TermRow<T> row;

  template <class Number>
  NF_HD SoftmaxTerm(const TermRow<T>& of_row, const Number*) : row(of_row) {}

  template <class V>
  NF_HD V logit(V cosine) const {
    return cosine;
  }

  template <class V, class Exp>
  NF_HD Cell<V> at(V cosine, const Exp& exp) const {
    const V e = exp.scaled(cosine * row.scale - row.shift);
    return {e, e * cosine, e};
  }
};

}  // namespace nf::math
