// inner_distance, d(x_i, w_j) for all pairs, and its backward on the CPU. The squared distance is one
// matrix product where that keeps its digits (math/distance.h); the cells that lie too near, and every L1
// cell, are computed from the differences, a tile of agents at a time.
#include "cpu/head.h"
#include "distance_checks.h"
#include "math/distance.h"

namespace nf::cpu {
namespace {

// As many tiles as threads, of at most 256 agents: a tile stays within L2.
int64_t chunk_for(const Tensor& weight) {
  return std::clamp<int64_t>((weight.size(0) + thread_count() - 1) / thread_count(), 1, 256);
}

// All rows in the accumulator type.
template <class T>
Buffer<T> widened(const Rows<T>& rows, int64_t count) {
  Buffer<T> wide(count * rows.length);
  for_rows(count, rows.length, [&](int64_t i) {
    rows.kernel.widen(rows.row(i), rows.length, T(1), wide.data + i * rows.length);
  });
  return wide;
}

template <class T>
void* cell(const Rows<T>& matrix, int64_t row, int64_t column) {
  return static_cast<char*>(matrix.row(row)) + column * matrix.kernel.item;
}

template <class T>
void forward(const Tensor& x, const Tensor& weight, int p, Tensor& out) {
  const HeadShape shape(x, weight, chunk_for(weight));
  const int64_t N = shape.batch, D = shape.dim;
  const AccumRows<T>& kernel = accum_rows<T>();
  const Rows<T> ws(weight, D), outs(out, shape.classes);
  const Buffer<T> features = widened(Rows<T>(x, D), N);
  std::vector<T> xx(static_cast<size_t>(p == 2 ? N : 0));
  for (size_t i = 0; i < xx.size(); ++i)
    xx[i] = T(kernel.dot(features.data + int64_t(i) * D, features.data + int64_t(i) * D, D));
  Buffer<T> agents(shape.slots * shape.chunk * D), cells(shape.slots * N * shape.chunk);
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* w = agents.data + slot * shape.chunk * D;
    T* d = cells.data + slot * N * shape.chunk;
    std::vector<T> ww(static_cast<size_t>(tile.width));
    for (int64_t j = 0; j < tile.width; ++j) {
      ws.kernel.widen(ws.row(tile.first + j), D, T(1), w + j * D);
      if (p == 2) ww[size_t(j)] = T(kernel.dot(w + j * D, w + j * D, D));
    }
    if (p == 2)
      multiply<T>({features.data, N, D, D}, Matrix<T>{w, tile.width, D, D}.transposed(),
                  {d, N, tile.width, tile.width});
    for (int64_t i = 0; i < N; ++i) {
      T* row = d + i * tile.width;
      const T* feature = features.data + i * D;
      for (int64_t j = 0; j < tile.width; ++j) {
        bool again = p == 1;
        if (p == 2) {
          row[j] = math::distance_from_products(xx[size_t(i)], ww[size_t(j)], row[j]);
          again = math::distance_needs_differences(row[j], xx[size_t(i)], ww[size_t(j)]);
        }
        if (again) row[j] = T(kernel.distance(feature, w + j * D, D, p));
      }
      outs.kernel.narrow(row, tile.width, T(1), cell(outs, i, tile.first));
    }
  });
}

// sum over the row
template <class T>
T row_sum(const T* g, int64_t n) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += double(g[j]);
  return T(sum);
}

// p = 2: dx_i = 2 (x_i sum_j g_ij - sum_j g_ij w_j) by products; p = 1: cell by cell. With labels the
// gradient of an agent comes from its own rows alone, and is computed from the differences.
template <class T>
void backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const int64_t* labels, int p,
              Tensor* dx, Tensor* dw) {
  const HeadShape shape(x, weight, chunk_for(weight));
  const int64_t N = shape.batch, D = shape.dim;
  const AccumRows<T>& kernel = accum_rows<T>();
  const Rows<T> ws(weight, D), grads(grad, shape.classes);
  const Buffer<T> features = widened(Rows<T>(x, D), N);
  Buffer<T> agents(shape.slots * shape.chunk * D), cells(shape.slots * N * shape.chunk);
  Buffer<T> products(dw != nullptr ? shape.slots * shape.chunk * D : 0);
  Buffer<T> sums(dx != nullptr ? shape.slots * N * D : 0);  // p = 2: of g w; p = 1: of g sign(x - w)
  Buffer<double> totals(shape.slots * N);                   // of g
  std::fill_n(sums.data, sums.tensor.numel(), T(0));
  std::fill_n(totals.data, shape.slots * N, 0.0);
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* w = agents.data + slot * shape.chunk * D;
    T* g = cells.data + slot * N * shape.chunk;
    for (int64_t j = 0; j < tile.width; ++j) ws.kernel.widen(ws.row(tile.first + j), D, T(1), w + j * D);
    for (int64_t i = 0; i < N; ++i) {
      T* row = g + i * tile.width;
      grads.kernel.widen(cell(grads, i, tile.first), tile.width, T(1), row);
      totals.data[slot * N + i] += double(row_sum(row, tile.width));
    }
    if (dx != nullptr) {
      T* sum = sums.data + slot * N * D;
      if (p == 2)
        multiply<T>({g, N, tile.width, tile.width}, {w, tile.width, D, D}, {sum, N, D, D}, true);
      else
        for (int64_t i = 0; i < N; ++i)
          for (int64_t j = 0; j < tile.width; ++j)
            kernel.add_distance_slope(g[i * tile.width + j], features.data + i * D, w + j * D, sum + i * D, D,
                                      1);
    }
    if (dw == nullptr) return;
    const Rows<T> out(*dw, D);
    T* product = products.data + slot * shape.chunk * D;
    const bool direct = labels != nullptr || p == 1;
    if (direct)
      std::fill_n(product, tile.width * D, T(0));
    else
      multiply<T>(Matrix<T>{g, N, tile.width, tile.width}.transposed(), {features.data, N, D, D},
                  {product, tile.width, D, D});
    if (direct)
      for (int64_t i = 0; i < N; ++i) {
        const int64_t own = labels != nullptr ? labels[i] - tile.first : 0;
        const int64_t begin = labels == nullptr || (own >= 0 && own < tile.width) ? own : tile.width;
        for (int64_t j = begin; j < (labels != nullptr ? std::min(begin + 1, tile.width) : tile.width); ++j)
          kernel.add_distance_slope(g[i * tile.width + j], w + j * D, features.data + i * D, product + j * D,
                                    D, p);
      }
    for (int64_t j = 0; j < tile.width; ++j) {
      T* row = product + j * D;
      if (!direct) {
        double total = 0;
        for (int64_t i = 0; i < N; ++i) total += double(g[i * tile.width + j]);
        for (int64_t d = 0; d < D; ++d) row[d] = T(2) * (T(total) * w[j * D + d] - row[d]);
      }
      out.kernel.narrow(row, D, T(1), out.row(tile.first + j));
    }
  });
  if (dx == nullptr) return;
  add_slots(sums.data, shape.slots, N * D);
  add_slots(totals.data, shape.slots, N);
  const Rows<T> out(*dx, D);
  for_rows(N, D, [&](int64_t i) {
    T* row = sums.data + i * D;
    if (p == 2)
      for (int64_t d = 0; d < D; ++d) row[d] = T(2) * (T(totals.data[i]) * features.data[i * D + d] - row[d]);
    out.kernel.narrow(row, D, T(1), out.row(i));
  });
}

Tensor inner_distance(Tensor x, Tensor weight, int64_t p) {
  check_distance("inner_distance", x, weight, p);
  Tensor out = fresh({x.size(0), weight.size(0)}, x.scalar_type());
  dispatch_accumulator(x.scalar_type(), [&]<class T>() { forward<T>(x, weight, int(p), out); });
  return out;
}

std::tuple<Tensor, Tensor> inner_distance_backward(Tensor grad, Tensor x, Tensor weight,
                                                   std::optional<Tensor> labels, int64_t p, bool need_x,
                                                   bool need_weight) {
  check_distance_backward("inner_distance_backward", grad, x, weight, labels, p);
  Tensor dx = gradient_like(x, need_x), dw = gradient_like(weight, need_weight);
  dispatch_accumulator(x.scalar_type(), [&]<class T>() {
    backward<T>(grad, x, weight, labels ? data_of<const int64_t>(*labels) : nullptr, int(p),
                need_x ? &dx : nullptr, need_weight ? &dw : nullptr);
  });
  return {dx, dw};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  m.impl("inner_distance", TORCH_BOX(&nf::cpu::inner_distance));
  m.impl("inner_distance_backward", TORCH_BOX(&nf::cpu::inner_distance_backward));
}
