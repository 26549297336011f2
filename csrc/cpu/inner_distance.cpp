// inner_distance, d(x_i, w_j) for all pairs, and its backward on the CPU. The squared distance and its
// gradients are matrix products where those keep their digits (math/distance.h); the cells that lie too
// near, and every L1 cell, are computed from the differences, a tile of agents at a time.
#include <bit>

#include "cpu/head.h"
#include "engine/distance_arguments.h"
#include "engine/distance_checks.h"
#include "math/distance.h"

namespace nf::cpu {
namespace {

// As many tiles as threads, of at most 256 agents: a tile stays within L2. No two tiles share a word of
// near cells.
int64_t chunk_for(const Tensor& weight) {
  const int64_t each = (weight.size(0) + thread_count() - 1) / thread_count();
  return std::min<int64_t>(256, std::max<int64_t>(1, near_words(each)) * kNearBits);
}

// All rows in the accumulator type.
template <class T>
void widen(const Rows<T>& rows, int64_t count, T* wide) {
  for_rows(count, rows.length,
           [&](int64_t i) { rows.kernel.widen(rows.row(i), rows.length, T(1), wide + i * rows.length); });
}

template <class T>
void* cell(const Rows<T>& matrix, int64_t row, int64_t column) {
  return static_cast<char*>(matrix.row(row)) + column * matrix.kernel.item;
}

template <class T>
void forward(const Tensor& x, const Tensor& weight, int p, Tensor& out, uint32_t* near) {
  const HeadShape shape(x, weight, chunk_for(weight));
  const int64_t N = shape.batch, D = shape.dim;
  const AccumRows<T>& kernel = accum_rows<T>();
  const Rows<T> ws(weight, D), outs(out, shape.classes);
  Block scratch;
  const Array wide = scratch.array<T>(N * D), tiles = scratch.array<T>(shape.slots * shape.chunk * D),
              distances = scratch.array<T>(shape.slots * N * shape.chunk);
  allocate(scratch);
  T *features = data_of<T>(wide), *agents = data_of<T>(tiles), *cells = data_of<T>(distances);
  widen(Rows<T>(x, D), N, features);
  std::vector<T> xx(static_cast<size_t>(p == 2 ? N : 0));
  for (size_t i = 0; i < xx.size(); ++i)
    xx[i] = T(kernel.dot(features + int64_t(i) * D, features + int64_t(i) * D, D));
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* w = agents + slot * shape.chunk * D;
    T* d = cells + slot * N * shape.chunk;
    std::vector<T> ww(static_cast<size_t>(tile.width));
    for (int64_t j = 0; j < tile.width; ++j) {
      ws.kernel.widen(ws.row(tile.first + j), D, T(1), w + j * D);
      if (p == 2) ww[size_t(j)] = T(kernel.dot(w + j * D, w + j * D, D));
    }
    if (p == 2)
      multiply<T>({features, N, D, D}, Matrix<T>{w, tile.width, D, D}.transposed(),
                  {d, N, tile.width, tile.width});
    for (int64_t i = 0; i < N; ++i) {
      T* row = d + i * tile.width;
      const T* feature = features + i * D;
      uint32_t* words =
          near != nullptr ? near + i * near_words(shape.classes) + tile.first / kNearBits : nullptr;
      if (words != nullptr) std::fill_n(words, near_words(tile.width), 0u);
      for (int64_t j = 0; j < tile.width; ++j) {
        bool again = p == 1;
        if (p == 2) {
          row[j] = math::distance_from_products(xx[size_t(i)], ww[size_t(j)], row[j]);
          again = math::distance_needs_differences(row[j], xx[size_t(i)], ww[size_t(j)]);
          if (again && words != nullptr) words[j / kNearBits] |= 1u << (j % kNearBits);
        }
        if (again) row[j] = T(kernel.distance(feature, w + j * D, D, p));
      }
      outs.kernel.store_as(row, tile.width, T(1), cell(outs, i, tile.first));
    }
  });
}

// sum over the row
template <class T>
double row_sum(const T* g, int64_t n) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += double(g[j]);
  return sum;
}

// What a tile's gradient is made of.
template <class T>
struct GradientTile {
  int64_t width;
  const T* features;  // [N, D]
  const T* agents;    // [width, D]
  T* g;               // [N, width]
};

// The cells that lie too near leave g, and give 2 g (x - w) to what 2 (x sum g - .) and 2 (w sum g - .)
// will be taken of: to x_sum [N, D] and w_sum [width, D], each perhaps null.
template <class T>
void take_near_cells(const GradientTile<T>& tile, const uint32_t* near, int64_t near_stride, int64_t batch,
                     int64_t dim, T* x_sum, T* w_sum) {
  for (int64_t i = 0; i < batch; ++i)
    for (int64_t word = 0; word < near_words(tile.width); ++word)
      for (uint32_t left = near[i * near_stride + word]; left != 0; left &= left - 1) {
        const int64_t j = word * kNearBits + std::countr_zero(left);
        T& g = tile.g[i * tile.width + j];
        const T *x = tile.features + i * dim, *w = tile.agents + j * dim;
        if (x_sum != nullptr) accum_rows<T>().add_distance_slope(T(-0.5) * g, x, w, x_sum + i * dim, dim, 2);
        if (w_sum != nullptr) accum_rows<T>().add_distance_slope(T(-0.5) * g, w, x, w_sum + j * dim, dim, 2);
        g = T(0);
      }
}

// w_sum += g slope, cell by cell; with labels [N] those of each row's own agent alone.
template <class T>
void add_agent_slopes(const GradientTile<T>& tile, const int64_t* labels, int64_t first, int64_t batch,
                      int64_t dim, int p, T* w_sum) {
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t own = labels != nullptr ? target_place(labels[i], first, tile.width) : 0;
    const int64_t begin = own >= 0 ? own : tile.width;
    const int64_t end = labels != nullptr ? std::min(begin + 1, tile.width) : tile.width;
    for (int64_t j = begin; j < end; ++j)
      accum_rows<T>().add_distance_slope(tile.g[i * tile.width + j], tile.agents + j * dim,
                                         tile.features + i * dim, w_sum + j * dim, dim, p);
  }
}

// p = 2: dx_i = 2 (x_i sum_j g_ij - sum_j g_ij w_j) by products, but for the near cells; p = 1: cell by
// cell. With labels the gradient of an agent comes from its own rows alone, cell by cell.
template <class T>
void backward(const Tensor& grad, const uint32_t* near, const Tensor& x, const Tensor& weight,
              const int64_t* labels, int p, Tensor* dx, Tensor* dw) {
  const HeadShape shape(x, weight, chunk_for(weight));
  const int64_t N = shape.batch, D = shape.dim;
  const AccumRows<T>& kernel = accum_rows<T>();
  const Rows<T> ws(weight, D), grads(grad, shape.classes);
  const int64_t tile_values = shape.slots * shape.chunk * D;
  Block scratch;
  const Array wide = scratch.array<T>(N * D), tiles = scratch.array<T>(tile_values),
              factors_of = scratch.array<T>(shape.slots * N * shape.chunk),
              tile_gradients = scratch.array<T>(dw != nullptr ? tile_values : 0),
              row_gradients = scratch.array<T>(dx != nullptr ? shape.slots * N * D : 0),
              row_totals = scratch.array<double>(shape.slots * N);
  allocate(scratch);
  T *features = data_of<T>(wide), *agents = data_of<T>(tiles), *cells = data_of<T>(factors_of),
    *products = data_of<T>(tile_gradients),
    *sums = data_of<T>(row_gradients);           // p = 2: of g w; p = 1: of g sign(x - w)
  double* totals = data_of<double>(row_totals);  // of g
  widen(Rows<T>(x, D), N, features);
  std::fill_n(sums, row_gradients.count(), T(0));
  std::fill_n(totals, shape.slots * N, 0.0);
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* w = agents + slot * shape.chunk * D;
    T* g = cells + slot * N * shape.chunk;
    const GradientTile<T> part{tile.width, features, w, g};
    for (int64_t j = 0; j < tile.width; ++j) ws.kernel.widen(ws.row(tile.first + j), D, T(1), w + j * D);
    for (int64_t i = 0; i < N; ++i)
      grads.kernel.widen(cell(grads, i, tile.first), tile.width, T(1), g + i * tile.width);
    T* sum = dx != nullptr ? sums + slot * N * D : nullptr;
    T* product = dw != nullptr ? products + slot * shape.chunk * D : nullptr;
    const bool direct = labels != nullptr || p == 1;
    if (dw != nullptr) std::fill_n(product, tile.width * D, T(0));
    if (dw != nullptr && direct) add_agent_slopes(part, labels, tile.first, N, D, p, product);
    if (p == 2)
      take_near_cells(part, near + tile.first / kNearBits, near_words(shape.classes), N, D, sum,
                      direct ? nullptr : product);
    for (int64_t i = 0; i < N; ++i) totals[slot * N + i] += row_sum(g + i * tile.width, tile.width);
    const Matrix<T> factors{g, N, tile.width, tile.width};
    if (dx != nullptr) {
      if (p == 2)
        multiply<T>(factors, {w, tile.width, D, D}, {sum, N, D, D}, true);
      else
        for (int64_t i = 0; i < N; ++i)
          for (int64_t j = 0; j < tile.width; ++j)
            kernel.add_distance_slope(g[i * tile.width + j], features + i * D, w + j * D, sum + i * D, D, 1);
    }
    if (dw == nullptr) return;
    const Rows<T> out(*dw, D);
    if (!direct) multiply<T>(factors.transposed(), {features, N, D, D}, {product, tile.width, D, D}, true);
    for (int64_t j = 0; j < tile.width; ++j) {
      T* row = product + j * D;
      if (!direct) {
        double total = 0;
        for (int64_t i = 0; i < N; ++i) total += double(g[i * tile.width + j]);
        for (int64_t d = 0; d < D; ++d) row[d] = T(2) * (T(total) * w[j * D + d] - row[d]);
      }
      out.kernel.store_as(row, D, T(1), out.row(tile.first + j));
    }
  });
  if (dx == nullptr) return;
  add_slots(sums, shape.slots, N * D);
  add_slots(totals, shape.slots, N);
  const Rows<T> out(*dx, D);
  for_rows(N, D, [&](int64_t i) {
    T* row = sums + i * D;
    if (p == 2)
      for (int64_t d = 0; d < D; ++d) row[d] = T(2) * (T(totals[i]) * features[i * D + d] - row[d]);
    out.kernel.store_as(row, D, T(1), out.row(i));
  });
}

std::tuple<Tensor, Tensor> inner_distance(const InnerDistanceArguments& in) {
  const Tensor &x = in.x, &weight = in.weight;
  check_distance(in.kName, x, weight, in.p);
  const int64_t N = x.size(0), C = weight.size(0);
  Tensor out = fresh({N, C}, x.scalar_type());
  const bool marks = in.need_near && in.p == 2;
  Tensor near = marks ? fresh({N, near_words(C)}, ScalarType::Int) : fresh({0}, ScalarType::Int);
  dispatch_accumulator(x.scalar_type(), [&]<class T>() {
    forward<T>(x, weight, int(in.p), out, marks ? data_of<uint32_t>(near) : nullptr);
  });
  return {out, near};
}

std::tuple<Tensor, Tensor> inner_distance_backward(const InnerDistanceBackwardArguments& in) {
  const Tensor &grad = in.grad, &near = in.near, &x = in.x, &weight = in.weight;
  check_distance_backward(in.kName, grad, near, x, weight, in.labels, in.p);
  Tensor dx = gradient_like(x, in.need_x), dw = gradient_like(weight, in.need_weight);
  dispatch_accumulator(x.scalar_type(), [&]<class T>() {
    backward<T>(grad, data_of<const uint32_t>(near), x, weight,
                in.labels ? data_of<const int64_t>(*in.labels) : nullptr, int(in.p),
                in.need_x ? &dx : nullptr, in.need_weight ? &dw : nullptr);
  });
  return {dx, dw};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::cpu::inner_distance>(m);
  nf::implement<&nf::cpu::inner_distance_backward>(m);
}
