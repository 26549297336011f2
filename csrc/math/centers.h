// A class of several centres has the cosine of the nearest of them, c_j = max over k of c_jk, and what is asked of
// the class is asked of that one: of equal ones the first, and NaN is larger than any number.
#pragma once

#include "math/host_device.h"

namespace nf::math {

// Whether a cosine takes the place of the largest before it. V is a number, or a vector of them.
template <class V>
NF_HD auto beats(V cosine, V best) {
  return (cosine > best) | ((cosine != cosine) & (best == best));
}

template <class T>
struct Winner {
  int64_t center;
  T cosine;
};

// cosine_of(k): that of centre k < centers, asked in order.
template <class T, class CosineOf>
NF_HD Winner<T> winner(int64_t centers, const CosineOf& cosine_of) {
  Winner<T> best{0, cosine_of(int64_t(0))};
  for (int64_t k = 1; k < centers; ++k) {
    const T cosine = cosine_of(k);
    if (beats(cosine, best.cosine)) best = {k, cosine};
  }
  return best;
}

}  // namespace nf::math
