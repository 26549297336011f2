// A row held by one warp: the first kHeld vectors of every lane stay in registers, so a row of up to
// 2 KiB is read from memory once; what is longer is read again when it is needed again.
#pragma once

#include "cuda/device/reduce.cuh"
#include "cuda/device/stored.cuh"
#include "math/normalize.h"

namespace nf {

template <class S, int kVec>
class WarpRow {
 public:
  static constexpr int kHeld = 4;
  static constexpr int kStep = kWarp * kVec;

  // length % kVec == 0
  NF_DEVICE WarpRow(const S* row, int64_t length) : row_(row + lane_id() * kVec), first_(lane_id() * kVec) {
    const int64_t left = length - first_;
    vectors_ = int(left > 0 ? (left + kStep - 1) / kStep : 0);
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if (k < vectors_) held_[k] = load_vector<kVec>(row_ + k * kStep);
  }

  // f(position, vector) for each of this lane's vectors.
  template <class F>
  NF_DEVICE void each(const F& f) const {
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if (k < vectors_) f(first_ + k * kStep, held_[k]);
    for (int k = kHeld; k < vectors_; ++k)
      f(first_ + int64_t(k) * kStep, load_vector<kVec>(row_ + int64_t(k) * kStep));
  }

 private:
  const S* row_;   // this lane's first vector
  int64_t first_;  // and its position in the row
  int vectors_;    // how many it has, kStep apart: one number, where a position each would cost registers
  Vector<S, kVec> held_[kHeld];
};

// A gradient that stays finite in float16 where eps rules the norm; see math::ruled_by_eps.
template <class S, class T>
NF_DEVICE T held_finite(T d, T norm, T eps, int p) {
  if constexpr (std::is_same_v<S, Half>) {
    if (math::ruled_by_eps(p, norm, eps)) return d > T(65504) ? T(65504) : d < T(-65504) ? T(-65504) : d;
  }
  return d;
}

}  // namespace nf
