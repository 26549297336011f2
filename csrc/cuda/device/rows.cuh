// What a warp does to its rows, for kernels that do it on the side.
#pragma once

#include "cuda/device/row_access.cuh"
#include "cuda/host/rows.h"

namespace nf {
namespace {

// f(p) with p known to the compiler: the loops over elements have no choice to make.
template <class F>
NF_DEVICE void with_power(int p, const F& f) {
  if (p == 2)
    f(std::integral_constant<int, 2>());
  else
    f(std::integral_constant<int, 1>());
}

// How row r is scaled, from the sum of its terms. All lanes.
template <class S, class Shape>
NF_DEVICE math::RowScale<accum_t<S>> scale_from_sum(const WarpRows<S, Shape>& rows, int r, int p,
                                                    accum_t<S> eps, accum_t<S> plain) {
  using T = accum_t<S>;
  const T tamer = math::norm_tamer(p, plain, eps);
  if (tamer != T(1)) plain = rows.sum_from_memory(r, [&](T x) { return math::norm_term<T>(p, x * tamer); });
  return math::row_scale(p, eps, tamer, plain);
}

// How each of a warp's rows is scaled. All lanes.
template <class S, class Shape>
NF_DEVICE void row_factors(const WarpRows<S, Shape>& rows, int p, accum_t<S> eps,
                           math::RowScale<accum_t<S>> (&scale)[Shape::kRows]) {
  using T = accum_t<S>;
  T sum[Shape::kRows];
  with_power(p, [&](auto power) {
#pragma unroll
    for (int r = 0; r < Shape::kRows; ++r) {
      sum[r] = 0;
      rows.each(r, [&](int64_t, const Vector<S, Shape::kVec>& v) {
#pragma unroll
        for (int e = 0; e < Shape::kVec; ++e) sum[r] += math::norm_term<T>(power, T(v.at[e]));
      });
    }
  });
  warp_sums(sum);
#pragma unroll
  for (int r = 0; r < Shape::kRows; ++r) scale[r] = scale_from_sum(rows, r, p, eps, sum[r]);
}

// The same from the 1 / ||x|| saved before, where that says it all. All lanes.
template <class S, class Shape>
NF_DEVICE math::RowScale<accum_t<S>> scale_again(const WarpRows<S, Shape>& rows, int r, int p, accum_t<S> eps,
                                                 accum_t<S> inverse) {
  using T = accum_t<S>;
  if (math::inverse_serves(inverse)) return {inverse, T(1), T(1) / inverse};
  return scale_from_sum(rows, r, p, eps,
                        rows.sum_from_memory(r, [&](T x) { return math::norm_term<T>(p, x); }));
}

// Stores kVec values of T as type O, in accesses of at most 16 bytes.
template <class O, int kVec, class T>
NF_DEVICE void store_as(void* y, int64_t at, const T (&values)[kVec]) {
  constexpr int kPiece = kPieceOf<kVec, O>;
#pragma unroll
  for (int piece = 0; piece < kVec; piece += kPiece) {
    Vector<O, kPiece> v;
#pragma unroll
    for (int e = 0; e < kPiece; ++e) v.at[e] = O(values[piece + e]);
    store_vector<kPiece>(static_cast<O*>(y) + at + piece, v);
  }
}

// y = x * scale for whole rows, stored as O.
template <class O, class S, class Shape, class T>
NF_DEVICE void store_unit_rows(const WarpRows<S, Shape>& rows, const math::RowScale<T> (&scale)[Shape::kRows],
                               void* y, int64_t first, int64_t length) {
#pragma unroll
  for (int r = 0; r < Shape::kRows; ++r)
    rows.each(r, [&](int64_t at, const Vector<S, Shape::kVec>& v) {
      T unit[Shape::kVec];
#pragma unroll
      for (int e = 0; e < Shape::kVec; ++e) unit[e] = T(v.at[e]) * scale[r].outer * scale[r].inner;
      store_as<O>(y, first + r * length + at, unit);
    });
}

// The rows at `place` of unit_rows (rows.h), whose factor is given. One warp.
template <class S, class Shape>
NF_DEVICE void unit_rows_of_warp(const UnitRows& task, const WarpPlace<Shape>& place, accum_t<S> factor) {
  using T = accum_t<S>;
  const int64_t length = task.length, first = place.first * length;
  const WarpRows<S, Shape> rows(static_cast<const S*>(task.x) + first, length, place);
  math::RowScale<T> scale[Shape::kRows];
  row_factors(rows, task.p, T(task.eps), scale);
#pragma unroll
  for (int r = 0; r < Shape::kRows; ++r)
    if (lane_id() == 0 && place.has(r)) {
      if (task.norm != nullptr) static_cast<T*>(task.norm)[place.first + r] = scale[r].norm;
      if (task.inverse != nullptr) static_cast<T*>(task.inverse)[place.first + r] = scale[r].inverse();
    }
  if (task.copy != nullptr) store_unit_rows<BFloat16>(rows, scale, task.copy, first, length);
  if (task.y == nullptr) return;
#pragma unroll
  for (int r = 0; r < Shape::kRows; ++r) scale[r] = scale[r].times(factor);
  if constexpr (std::is_same_v<T, double>)
    return store_unit_rows<double>(rows, scale, task.y, first, length);
  else if (task.y_type == ScalarType::Half)
    return store_unit_rows<Half>(rows, scale, task.y, first, length);
  else if (task.y_type == ScalarType::BFloat16)
    return store_unit_rows<BFloat16>(rows, scale, task.y, first, length);
  else
    return store_unit_rows<float>(rows, scale, task.y, first, length);
}

// Whether unit_rows_of_warp may move vectors of 16 bytes.
template <class S>
bool rows_are_aligned(const UnitRows& task) {
  return task.length % kVectorOf<S> == 0 && aligned16(task.x) && aligned16(task.y) && aligned16(task.copy);
}

}  // namespace
}  // namespace nf
