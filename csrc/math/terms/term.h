// What the terms of the sweep have in common. A term is what one cell that is not the target, the cosine c of a
// row and a class, adds to its row:
//
//   value        to the row's loss, or to what the loss is made of
//   second       to the second running sum
//   coefficient  of x_hat in dW and of w_hat in dX, but for a factor of the row that is known later
//
// A term is a struct of the accumulator type T, made of a TermRow and of those numbers, float64 or in a
// kernel's own copy, with
//
//   static constexpr bool kSoftmax   value is E = exp(s f(c) - kappa); then logit(c) is f(c)
//   static constexpr bool kThreshold, int kNumbers
//                                    whether it reads the row's threshold, and how many numbers common to all rows
//   Cell<V> at(V c, exp)             V is T, or a vector of it: branches are selections
//
// and one file of its own. `exp` is one of the types below or what the instruction set has; engine/terms.h
// gives every term its number.
#pragma once

#include "math/host_device.h"

namespace nf::math {

// What a row says to its term: at most 16 bytes in float32, since a block keeps one for each of its rows.
template <class T>
struct TermRow {
  T scale;      // s
  T shift;      // kappa
  T threshold;  // of the cosine, or of a distance
};

template <class V>
struct Cell {
  V value;
  V second;
  V coefficient;
};

// exp of what a term says. `scaled` meets the row's scale and shift, which an implementation by powers of two
// has multiplied by log2(e) beforehand; `natural` meets plain numbers. And the square root of what is not negative.
struct PlainExp {
  template <class T>
  NF_HD T scaled(T x) const {
    return std::exp(x);
  }
  template <class T>
  NF_HD T natural(T x) const {
    return std::exp(x);
  }
  template <class T>
  NF_HD T root(T x) const {
    return std::sqrt(x);
  }
};

}  // namespace nf::math
