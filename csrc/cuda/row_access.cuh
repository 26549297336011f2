// A row held by one warp: the first kHeld vectors of every lane stay in registers, so a row of up to
// 2 KiB is read from memory once; what is longer is read again when it is needed again.
#pragma once

#include "math/normalize.h"
#include "reduce.cuh"
#include "stored.cuh"

namespace nf {

template <class S, int kVec>
class WarpRow {
 public:
  static constexpr int kHeld = 4;
  static constexpr int kStep = kWarp * kVec;

  // length % kVec == 0
  NF_DEVICE WarpRow(const S* row, int64_t length) : row_(row), length_(length) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int64_t at = int64_t(k) * kStep + lane_id() * kVec;
      if (at < length) held_[k] = load_vector<kVec>(row + at);
    }
  }

  // f(position, vector) for each of this lane's vectors.
  template <class F>
  NF_DEVICE void each(const F& f) const {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int64_t at = int64_t(k) * kStep + lane_id() * kVec;
      if (at < length_) f(at, held_[k]);
    }
    for (int64_t at = int64_t(kHeld) * kStep + lane_id() * kVec; at < length_; at += kStep)
      f(at, load_vector<kVec>(row_ + at));
  }

 private:
  const S* row_;
  int64_t length_;
  Vector<S, kVec> held_[kHeld];
};

// y = (x * outer) * inner and the norm; see math/normalize.h for rows that need two factors.
template <class T>
struct RowScale {
  T outer;
  T inner;
  T norm;
};

// Over the values a warp (or any group) holds: `sum(factor)` adds the p-norm's terms of factor * x over
// the whole row, `largest()` is its largest magnitude; both give every lane the same answer.
template <class T, class Sum, class Largest>
NF_DEVICE RowScale<T> row_scale(int p, T eps, const Sum& sum, const Largest& largest) {
  const T plain = sum(T(1));
  if (!math::norm_needs_rescue(p, plain, eps)) {
    const T norm = math::norm_value(p, plain, eps);
    return {T(1) / norm, T(1), norm};
  }
  const T top = largest();
  if (!(top > 0)) {  // all zero under eps = 0: y = 0 without dividing by the norm; or all NaN
    const T norm = math::norm_value(p, plain, eps);
    return {norm, T(1), norm};
  }
  const T scaled = math::norm_value(p, sum(T(1) / top), math::norm_scaled_eps(p, eps, top));
  return {T(1) / top, T(1) / scaled, top * scaled};
}

// A gradient that stays finite in float16 where eps rules the norm; see math::ruled_by_eps.
template <class S, class T>
NF_DEVICE T held_finite(T d, T norm, T eps, int p) {
  if constexpr (std::is_same_v<S, Half>) {
    if (math::ruled_by_eps(p, norm, eps)) return d > T(65504) ? T(65504) : d < T(-65504) ? T(-65504) : d;
  }
  return d;
}

}  // namespace nf
