// Unit rows and tangent projections, one warp per row, 16 bytes per access where alignment allows.
#include "row_access.cuh"
#include "rows.h"

namespace nf {
namespace {

constexpr int kThreads = 128;  // four rows per block: short rows still fill a multiprocessor
constexpr int kRowsPerBlock = kThreads / kWarp;

Grid grid_for(int64_t rows) { return {(rows + kRowsPerBlock - 1) / kRowsPerBlock}; }

template <class S, int kVec>
NF_DEVICE RowScale<accum_t<S>> scale_of(const WarpRow<S, kVec>& row, int p, accum_t<S> eps) {
  using T = accum_t<S>;
  const auto sum = [&](T factor) {
    T total = 0;
    row.each([&](int64_t, const Vector<S, kVec>& v) {
      for (int e = 0; e < kVec; ++e) total += math::norm_term<T>(p, T(v.at[e]) * factor);
    });
    return warp_sum(total);
  };
  const auto largest = [&] {
    T top = 0;
    row.each([&](int64_t, const Vector<S, kVec>& v) {
      for (int e = 0; e < kVec; ++e) {
        const T magnitude = std::fabs(T(v.at[e]));
        top = magnitude > top ? magnitude : top;
      }
    });
    return warp_largest(top);
  };
  return row_scale<T>(p, eps, sum, largest);
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
NF_DEVICE void store_unit_row(const WarpRow<S, kVec>& row, const RowScale<T>& scale, void* y, int64_t first) {
  row.each([&](int64_t at, const Vector<S, kVec>& v) {
    T unit[kVec];
    for (int e = 0; e < kVec; ++e) unit[e] = T(v.at[e]) * scale.outer * scale.inner;
    store_as<O>(y, first + at, unit);
  });
}

template <class S, int kVec>
NF_KERNEL(kThreads)
unit_rows_kernel(const S* __restrict__ x,  // [rows, length]
                 int64_t rows, int64_t length, int p, accum_t<S> eps, void* y,
                 int y_type,                        // [rows, length] or null
                 BFloat16* __restrict__ copy,       // [rows, length] or null
                 accum_t<S>* __restrict__ norm,     // [rows] or null
                 accum_t<S>* __restrict__ inverse)  // [rows] or null
{
  using T = accum_t<S>;
  const int64_t r = block_id() * kRowsPerBlock + warp_id();
  if (r >= rows) return;  // the whole warp leaves
  const WarpRow<S, kVec> row(x + r * length, length);
  const RowScale<T> scale = scale_of(row, p, eps);
  if (lane_id() == 0) {
    if (norm != nullptr) norm[r] = scale.norm;
    if (inverse != nullptr) inverse[r] = T(1) / scale.norm;
  }
  const int64_t first = r * length;
  if (copy != nullptr) store_unit_row<BFloat16>(row, scale, copy, first);
  if (y == nullptr) return;
  switch (ScalarType(y_type)) {
    case ScalarType::Half:
      return store_unit_row<Half>(row, scale, y, first);
    case ScalarType::BFloat16:
      return store_unit_row<BFloat16>(row, scale, y, first);
    case ScalarType::Double:
      return store_unit_row<double>(row, scale, y, first);
    default:
      return store_unit_row<float>(row, scale, y, first);
  }
}

template <class S, int kVec>
NF_KERNEL(kThreads)
project_rows_kernel(const S* __restrict__ x,  // [rows, length]
                    int64_t rows, int64_t length, accum_t<S> eps,
                    const accum_t<S>* __restrict__ inverse,  // [rows] or null
                    const accum_t<S>* g, S* out)             // [rows, length], perhaps the same memory
{
  using T = accum_t<S>;
  const int64_t r = block_id() * kRowsPerBlock + warp_id();
  if (r >= rows) return;  // the whole warp leaves
  const WarpRow<S, kVec> row(x + r * length, length);
  const T factor = inverse != nullptr ? inverse[r] : T(1) / scale_of(row, 2, eps).norm;
  const T* gradient = g + r * length;
  T radial = 0;
  row.each([&](int64_t at, const Vector<S, kVec>& v) {
    for (int e = 0; e < kVec; ++e) radial += T(v.at[e]) * factor * gradient[at + e];
  });
  radial = warp_sum(radial);
  row.each([&](int64_t at, const Vector<S, kVec>& v) {
    T d[kVec];
    for (int e = 0; e < kVec; ++e)
      d[e] =
          held_finite<S>(math::normalize_vjp<T>(gradient[at + e], T(v.at[e]) * factor, radial, factor, T(0)),
                         T(1) / factor, eps, 2);
    store_as<S>(out, r * length + at, d);
  });
}

}  // namespace

void unit_rows(Queue& queue, const UnitRows& task) {
  dispatch_stored(task.type, [&]<class S>() {
    using T = accum_t<S>;
    const bool vector =
        task.length % kVectorOf<S> == 0 && aligned16(task.x) && aligned16(task.y) && aligned16(task.copy);
    const auto kernel = vector ? unit_rows_kernel<S, kVectorOf<S>> : unit_rows_kernel<S, 1>;
    launch("unit_rows", queue, kernel, grid_for(task.rows), kThreads, 0, static_cast<const S*>(task.x),
           task.rows, task.length, task.p, T(task.eps), task.y, int(task.y_type),
           static_cast<BFloat16*>(task.copy), static_cast<T*>(task.norm), static_cast<T*>(task.inverse));
  });
}

void project_rows(Queue& queue, const ProjectRows& task) {
  dispatch_stored(task.type, [&]<class S>() {
    using T = accum_t<S>;
    const bool vector = task.length % kVectorOf<S> == 0 && aligned16(task.x) && aligned16(task.out);
    const auto kernel = vector ? project_rows_kernel<S, kVectorOf<S>> : project_rows_kernel<S, 1>;
    launch("project_rows", queue, kernel, grid_for(task.rows), kThreads, 0, static_cast<const S*>(task.x),
           task.rows, task.length, T(task.eps), static_cast<const T*>(task.inverse),
           static_cast<const T*>(task.g), static_cast<S*>(task.out));
  });
}

}  // namespace nf
