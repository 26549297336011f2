// inner_distance, d(x_i, w_j) for all pairs, and pair_distance, d(a_i, b_i), with their backward, on the
// CPU. The squared distance is one matrix product where that keeps its digits (math/distance.h); the
// cells that lie too near, and every L1 cell, are computed from the differences, a tile of agents at a
// time.
#include "cpu/head.h"
#include "math/distance.h"

namespace nf::cpu {
namespace {

void check_distance(const char* op, const Tensor& x, const Tensor& weight, int64_t p) {
  check_head(op, x, weight);
  if (p != 1 && p != 2) fail(op, ": expected `p` to be 1 or 2, got ", p);
}

// As many tiles as threads, of at most 256 agents: a tile stays within L2.
int64_t chunk_for(const Tensor& weight) {
  return std::clamp<int64_t>((weight.size(0) + thread_count() - 1) / thread_count(), 1, 256);
}

// All rows in the accumulator type.
template <class T>
Buffer<T> widened(const Rows<T>& rows, int64_t count) {
  Buffer<T> wide(count * rows.length);
  for_rows(count, rows.length,
           [&](int64_t i) { rows.kernel.widen(rows.row(i), rows.length, T(1), wide.data + i * rows.length); });
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
    for (int64_t j = 0; j < tile.width; ++j)
      ws.kernel.widen(ws.row(tile.first + j), D, T(1), w + j * D);
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
            kernel.add_distance_slope(g[i * tile.width + j], features.data + i * D, w + j * D, sum + i * D, D, 1);
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
          kernel.add_distance_slope(g[i * tile.width + j], w + j * D, features.data + i * D, product + j * D, D, p);
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
      for (int64_t d = 0; d < D; ++d)
        row[d] = T(2) * (T(totals.data[i]) * features.data[i * D + d] - row[d]);
    out.kernel.narrow(row, D, T(1), out.row(i));
  });
}

Tensor inner_distance(Tensor x, Tensor weight, int64_t p) {
  check_distance("inner_distance", x, weight, p);
  Tensor out = fresh({x.size(0), weight.size(0)}, x.scalar_type());
  const auto run = accumulator(x.scalar_type()) == ScalarType::Double ? forward<double> : forward<float>;
  run(x, weight, int(p), out);
  return out;
}

std::tuple<Tensor, Tensor> inner_distance_backward(Tensor grad, Tensor x, Tensor weight,
                                                   std::optional<Tensor> labels, int64_t p, bool need_x,
                                                   bool need_weight) {
  const char* op = "inner_distance_backward";
  check_distance(op, x, weight, p);
  check_matrix(op, "grad", grad);
  check_shape(op, "grad", grad, x.size(0), weight.size(0));
  if (labels) check_labels(op, *labels, x.size(0));
  Tensor dx = need_x ? fresh_like(x) : fresh({0}, x.scalar_type());
  Tensor dw = need_weight ? fresh_like(weight) : fresh({0}, weight.scalar_type());
  const auto run = accumulator(x.scalar_type()) == ScalarType::Double ? backward<double> : backward<float>;
  run(grad, x, weight, labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr, int(p),
      need_x ? &dx : nullptr, need_weight ? &dw : nullptr);
  return {dx, dw};
}

void check_pair(const char* op, const Tensor& a, const Tensor& b, int64_t p) {
  check_matrix(op, "a", a);
  check_matrix(op, "b", b);
  check_shape(op, "b", b, a.size(0), a.size(1));
  if (accumulator(a.scalar_type()) != accumulator(b.scalar_type()))
    fail(op, ": expected `a` and `b` to be both float64 or both not, got ", name_of(a.scalar_type()), " and ",
         name_of(b.scalar_type()));
  if (p != 1 && p != 2) fail(op, ": expected `p` to be 1 or 2, got ", p);
}

template <class T>
void pair_forward(const Rows<T>& a, const Rows<T>& b, int64_t batch, int p, T* out) {
  for_rows(batch, a.length, [&](int64_t i) {
    std::vector<T> rows(static_cast<size_t>(2 * a.length));
    a.kernel.widen(a.row(i), a.length, T(1), rows.data());
    b.kernel.widen(b.row(i), a.length, T(1), rows.data() + a.length);
    out[i] = T(accum_rows<T>().distance(rows.data(), rows.data() + a.length, a.length, p));
  });
}

template <class T>
void pair_backward(const T* grad, const Rows<T>& a, const Rows<T>& b, int64_t batch, int p, Tensor* da,
                   Tensor* db) {
  const int64_t D = a.length;
  for_rows(batch, D, [&](int64_t i) {
    std::vector<T> rows(static_cast<size_t>(3 * D), T(0));
    T *first = rows.data(), *second = first + D, *slope = second + D;
    a.kernel.widen(a.row(i), D, T(1), first);
    b.kernel.widen(b.row(i), D, T(1), second);
    accum_rows<T>().add_distance_slope(grad[i], first, second, slope, D, p);
    if (da != nullptr) a.kernel.narrow(slope, D, T(1), Rows<T>(*da, D).row(i));
    if (db != nullptr) b.kernel.narrow(slope, D, T(-1), Rows<T>(*db, D).row(i));
  });
}

template <class F>
void dispatch_wide(const Tensor& t, const F& f) {
  if (accumulator(t.scalar_type()) == ScalarType::Double)
    f.template operator()<double>();
  else
    f.template operator()<float>();
}

Tensor pair_distance(Tensor a, Tensor b, int64_t p) {
  check_pair("pair_distance", a, b, p);
  Tensor out = fresh({a.size(0)}, accumulator(a.scalar_type()));
  dispatch_wide(a, [&]<class T>() {
    pair_forward<T>(Rows<T>(a, a.size(1)), Rows<T>(b, a.size(1)), a.size(0), int(p),
                    static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor> pair_distance_backward(Tensor grad, Tensor a, Tensor b, int64_t p, bool need_a,
                                                  bool need_b) {
  check_pair("pair_distance_backward", a, b, p);
  Tensor da = need_a ? fresh_like(a) : fresh({0}, a.scalar_type());
  Tensor db = need_b ? fresh_like(b) : fresh({0}, b.scalar_type());
  dispatch_wide(a, [&]<class T>() {
    pair_backward<T>(static_cast<const T*>(grad.const_data_ptr()), Rows<T>(a, a.size(1)),
                     Rows<T>(b, a.size(1)), a.size(0), int(p), need_a ? &da : nullptr,
                     need_b ? &db : nullptr);
  });
  return {da, db};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  m.impl("inner_distance", TORCH_BOX(&nf::cpu::inner_distance));
  m.impl("inner_distance_backward", TORCH_BOX(&nf::cpu::inner_distance_backward));
  m.impl("pair_distance", TORCH_BOX(&nf::cpu::pair_distance));
  m.impl("pair_distance_backward", TORCH_BOX(&nf::cpu::pair_distance_backward));
}
