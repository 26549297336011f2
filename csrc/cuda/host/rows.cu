// Unit rows and tangent projections, some rows to a warp, 16 bytes per access where alignment allows.
#include "cuda/device/rows.cuh"

namespace nf {
namespace {

constexpr int kThreads = 128;  // four warps: few rows still reach many multiprocessors
constexpr int kWarps = kThreads / kWarp;

template <class Shape>
Grid grid_for(int64_t rows) {
  constexpr int kRowsPerBlock = kWarps * Shape::kRows;
  return {(rows + kRowsPerBlock - 1) / kRowsPerBlock};
}

template <class Shape>
NF_DEVICE WarpPlace<Shape> place_of_warp(int64_t rows) {
  return {(block_id() * kWarps + warp_id()) * Shape::kRows, rows};
}

template <class S, class Shape>
NF_KERNEL_RESIDENT(kThreads, (kResidentOf<Shape, kThreads, 1>))
unit_rows_kernel(UnitRows task) {
  const WarpPlace<Shape> place = place_of_warp<Shape>(task.rows);
  if (!place.has(0)) return;  // the whole warp leaves
  const double s = task.factor.value(), root = std::sqrt(std::fabs(s));
  const double factor = task.part == FactorPart::kWhole        ? s
                        : task.part == FactorPart::kSignedRoot ? std::copysign(root, s)
                                                               : root;
  unit_rows_of_warp<S>(task, place, accum_t<S>(factor));
}

template <class S, class Shape>
NF_KERNEL_RESIDENT(kThreads, (kResidentOf<Shape, kThreads, 1 + sizeof(accum_t<S>) / sizeof(S)>))
project_rows_kernel(const S* __restrict__ x,  // [rows, length]
                    int64_t rows, int64_t length, accum_t<S> eps,
                    const accum_t<S>* __restrict__ inverse,  // [rows] or null
                    const accum_t<S>* g, S* out,             // [rows, length], perhaps the same memory
                    Scale factor) {
  using T = accum_t<S>;
  constexpr int kVec = Shape::kVec, kRows = Shape::kRows;
  const WarpPlace<Shape> place = place_of_warp<Shape>(rows);
  if (!place.has(0)) return;  // the whole warp leaves
  const int64_t first = place.first * length;
  const WarpRows<S, Shape> own(x + first, length, place);
  const WarpRows<T, Shape> gradient(g + first, length, place);
  math::RowScale<T> scale[kRows];
  T radial[kRows];
  if (inverse != nullptr) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      scale[r] = scale_again(own, r, 2, eps, inverse[place.first + (place.has(r) ? r : 0)]);
  } else {
    row_factors(own, 2, eps, scale);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    radial[r] = 0;
    own.each_with(r, gradient, [&](int64_t, const Vector<S, kVec>& v, const Vector<T, kVec>& d) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) radial[r] += T(v.at[e]) * scale[r].outer * scale[r].inner * d.at[e];
    });
  }
  warp_sums(radial);
  const T times = T(factor.value());
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const T inner = scale[r].times(times).inner;
    // A lane has read its places of g before it writes the same of `out`.
    own.each_with(r, gradient, [&](int64_t at, const Vector<S, kVec>& v, const Vector<T, kVec>& of) {
      T d[kVec];
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const T y = T(v.at[e]) * scale[r].outer * scale[r].inner;
        d[e] = held_finite<S>(math::normalize_vjp<T>(of.at[e], y, radial[r], scale[r].outer, inner, T(0)),
                              scale[r].norm, eps, 2);
      }
      store_as<S>(out, first + r * length + at, d);
    });
  }
}

}  // namespace

void unit_rows(Queue& queue, const UnitRows& task) {
  dispatch_stored(task.type, [&]<class S>() {
    dispatch_rows<kVectorOf<S>>(rows_are_aligned<S>(task), task.length, [&]<class Shape>() {
      launch("unit_rows", queue, unit_rows_kernel<S, Shape>, grid_for<Shape>(task.rows), kThreads, 0, task);
    });
  });
}

void project_rows(Queue& queue, const ProjectRows& task) {
  dispatch_stored(task.type, [&]<class S>() {
    using T = accum_t<S>;
    const bool aligned =
        task.length % kVectorOf<S> == 0 && aligned16(task.x) && aligned16(task.g) && aligned16(task.out);
    dispatch_rows<kVectorOf<S>>(aligned, task.length, [&]<class Shape>() {
      launch("project_rows", queue, project_rows_kernel<S, Shape>, grid_for<Shape>(task.rows), kThreads, 0,
             static_cast<const S*>(task.x), task.rows, task.length, T(task.eps),
             static_cast<const T*>(task.inverse), static_cast<const T*>(task.g), static_cast<S*>(task.out),
             task.factor);
    });
  });
}

}  // namespace nf
