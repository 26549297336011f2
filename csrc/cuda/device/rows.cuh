// What a warp does to a row, for kernels that do it on the side.
#pragma once

#include "cuda/device/row_access.cuh"
#include "cuda/host/rows.h"

namespace nf {
namespace {

template <class S, int kVec>
NF_DEVICE math::RowScale<accum_t<S>> row_factors(const WarpRow<S, kVec>& row, int p, accum_t<S> eps) {
  using T = accum_t<S>;
  const auto sum = [&](T factor) {
    T total = 0;
    row.each([&](int64_t, const Vector<S, kVec>& v) {
      for (int e = 0; e < kVec; ++e) total += math::norm_term<T>(p, T(v.at[e]) * factor);
    });
    return warp_sum(total);
  };
  const T plain = sum(T(1)), tamer = math::norm_tamer(p, plain, eps);
  return math::row_scale(p, eps, tamer, tamer == T(1) ? plain : sum(tamer));
}

// The same from the 1 / ||x|| saved before, where that says it all. All lanes.
template <class S, int kVec>
NF_DEVICE math::RowScale<accum_t<S>> scale_again(const WarpRow<S, kVec>& row, int p, accum_t<S> eps,
                                                 accum_t<S> inverse) {
  using T = accum_t<S>;
  return math::inverse_serves(inverse) ? math::RowScale<T>{inverse, T(1), T(1) / inverse}
                                       : row_factors(row, p, eps);
}

// Stores kVec values of T as type O, in accesses of at most 16 bytes.
template <class O, int kVec, class T>
NF_DEVICE void store_as(void* y, int64_t at, const T (&values)[kVec]) {
  constexpr int kPiece = kVec * sizeof(O) > 16 ? int(16 / sizeof(O)) : kVec;
  for (int piece = 0; piece < kVec; piece += kPiece) {
    Vector<O, kPiece> v;
    for (int e = 0; e < kPiece; ++e) v.at[e] = O(values[piece + e]);
    store_vector<kPiece>(static_cast<O*>(y) + at + piece, v);
  }
}

// y = x * scale for the whole row, stored as O.
template <class O, class S, int kVec, class T>
NF_DEVICE void store_unit_row(const WarpRow<S, kVec>& row, const math::RowScale<T>& scale, void* y,
                              int64_t first) {
  row.each([&](int64_t at, const Vector<S, kVec>& v) {
    T unit[kVec];
    for (int e = 0; e < kVec; ++e) unit[e] = T(v.at[e]) * scale.outer * scale.inner;
    store_as<O>(y, first + at, unit);
  });
}

// One row of unit_rows (rows.h), whose factor is given. One warp.
template <class S, int kVec>
NF_DEVICE void unit_row(const UnitRows& task, int64_t r, accum_t<S> factor) {
  using T = accum_t<S>;
  const WarpRow<S, kVec> row(static_cast<const S*>(task.x) + r * task.length, task.length);
  const math::RowScale<T> scale = row_factors(row, task.p, T(task.eps));
  if (lane_id() == 0) {
    if (task.norm != nullptr) static_cast<T*>(task.norm)[r] = scale.norm;
    if (task.inverse != nullptr) static_cast<T*>(task.inverse)[r] = scale.inverse();
  }
  const int64_t first = r * task.length;
  if (task.copy != nullptr) store_unit_row<BFloat16>(row, scale, task.copy, first);
  if (task.y == nullptr) return;
  const math::RowScale<T> scaled = scale.times(factor);
  switch (task.y_type) {
    case ScalarType::Half:
      return store_unit_row<Half>(row, scaled, task.y, first);
    case ScalarType::BFloat16:
      return store_unit_row<BFloat16>(row, scaled, task.y, first);
    case ScalarType::Double:
      return store_unit_row<double>(row, scaled, task.y, first);
    default:
      return store_unit_row<float>(row, scaled, task.y, first);
  }
}

// Whether unit_row may move vectors of 16 bytes.
template <class S>
bool rows_are_aligned(const UnitRows& task) {
  return task.length % kVectorOf<S> == 0 && aligned16(task.x) && aligned16(task.y) && aligned16(task.copy);
}

}  // namespace
}  // namespace nf
