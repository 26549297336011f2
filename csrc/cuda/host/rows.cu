// Unit rows and tangent projections, one warp per row, 16 bytes per access where alignment allows.
#include "cuda/device/rows.cuh"

namespace nf {
namespace {

constexpr int kThreads = 128;  // four rows per block: short rows still fill a multiprocessor
constexpr int kRowsPerBlock = kThreads / kWarp;

Grid grid_for(int64_t rows) { return {(rows + kRowsPerBlock - 1) / kRowsPerBlock}; }

template <class S, int kVec>
NF_KERNEL(kThreads)
unit_rows_kernel(UnitRows task) {
  const int64_t r = block_id() * kRowsPerBlock + warp_id();
  if (r >= task.rows) return;  // the whole warp leaves
  const double s = task.factor.value(), root = std::sqrt(std::fabs(s));
  const double factor = task.part == FactorPart::kWhole        ? s
                        : task.part == FactorPart::kSignedRoot ? std::copysign(root, s)
                                                               : root;
  unit_row<S, kVec>(task, r, accum_t<S>(factor));
}

template <class S, int kVec>
NF_KERNEL(kThreads)
project_rows_kernel(const S* __restrict__ x,  // [rows, length]
                    int64_t rows, int64_t length, accum_t<S> eps,
                    const accum_t<S>* __restrict__ inverse,  // [rows] or null
                    const accum_t<S>* g, S* out,             // [rows, length], perhaps the same memory
                    Scale factor) {
  using T = accum_t<S>;
  const int64_t r = block_id() * kRowsPerBlock + warp_id();
  if (r >= rows) return;  // the whole warp leaves
  const WarpRow<S, kVec> row(x + r * length, length);
  const math::RowScale<T> scale =
      inverse != nullptr ? scale_again(row, 2, eps, inverse[r]) : row_factors(row, 2, eps);
  const T* gradient = g + r * length;
  T radial = 0;
  row.each([&](int64_t at, const Vector<S, kVec>& v) {
    for (int e = 0; e < kVec; ++e) radial += T(v.at[e]) * scale.outer * scale.inner * gradient[at + e];
  });
  radial = warp_sum(radial);
  const T inner = scale.times(T(factor.value())).inner;
  row.each([&](int64_t at, const Vector<S, kVec>& v) {
    T d[kVec];
    for (int e = 0; e < kVec; ++e) {
      const T y = T(v.at[e]) * scale.outer * scale.inner;
      d[e] = held_finite<S>(math::normalize_vjp<T>(gradient[at + e], y, radial, scale.outer, inner, T(0)),
                            scale.norm, eps, 2);
    }
    store_as<S>(out, r * length + at, d);
  });
}

}  // namespace

void unit_rows(Queue& queue, const UnitRows& task) {
  dispatch_stored(task.type, [&]<class S>() {
    const auto kernel =
        rows_are_aligned<S>(task) ? unit_rows_kernel<S, kVectorOf<S>> : unit_rows_kernel<S, 1>;
    launch("unit_rows", queue, kernel, grid_for(task.rows), kThreads, 0, task);
  });
}

void project_rows(Queue& queue, const ProjectRows& task) {
  dispatch_stored(task.type, [&]<class S>() {
    using T = accum_t<S>;
    const bool vector = task.length % kVectorOf<S> == 0 && aligned16(task.x) && aligned16(task.out);
    const auto kernel = vector ? project_rows_kernel<S, kVectorOf<S>> : project_rows_kernel<S, 1>;
    launch("project_rows", queue, kernel, grid_for(task.rows), kThreads, 0, static_cast<const S*>(task.x),
           task.rows, task.length, T(task.eps), static_cast<const T*>(task.inverse),
           static_cast<const T*>(task.g), static_cast<S*>(task.out), task.factor);
  });
}

}  // namespace nf
