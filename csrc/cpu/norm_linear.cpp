// norm_linear, s * cos(x_i, w_j), and its backward on the CPU. Unit rows of the weight exist only as
// one tile per thread.
#include "cpu/tile_products.h"
#include "engine/cosine_arguments.h"
#include "math/normalize.h"

namespace nf::cpu {
namespace {

// A tile's columns of a stored [N, C] matrix, as T with the given leading dimension: in place where
// the storage type is T, through `cells` otherwise.
template <class T>
Matrix<T> columns(const Rows<T>& matrix, int64_t batch, const Tile& tile, T* cells) {
  if (cells == nullptr)
    return {static_cast<T*>(matrix.row(0)) + tile.first, batch, tile.width, matrix.length};
  return {cells, batch, tile.width, tile.width};
}

template <class T>
void* cell(const Rows<T>& matrix, int64_t row, int64_t column) {
  return static_cast<char*>(matrix.row(row)) + column * matrix.kernel.item;
}

// x_hat[i] = x_i / ||x_i|| (or x_i), and 1 / ||x_i||.
template <class T>
void unit_features(const Rows<T>& x, int64_t batch, bool normalize_input, T eps, T* x_hat, T* inverse) {
  for_rows(batch, x.length, [&](int64_t i) {
    T* row = x_hat + i * x.length;
    unit_rows(x, Tile{i, 1}, eps, row, inverse + i);
    if (!normalize_input) x.kernel.widen(x.row(i), x.length, T(1), row);
  });
}

// As many tiles as threads, of at most 512 classes: a tile of unit weights stays within L2.
int64_t chunk_for(const Tensor& weight) {
  return std::clamp<int64_t>((weight.size(0) + thread_count() - 1) / thread_count(), 1, 512);
}

template <class T>
void forward(const Tensor& x, const Tensor& weight, double scale, bool normalize_input, double eps,
             Tensor& out) {
  const HeadShape shape(x, weight, chunk_for(weight));
  const int64_t N = shape.batch, D = shape.dim;
  const Rows<T> xs(x, D), outs(out, shape.classes);
  const bool direct = out.element_size() == sizeof(T);
  Block scratch;
  const Array features = scratch.array<T>(N * D), x_norms = scratch.array<T>(N),
              w_norms = scratch.array<T>(shape.slots * shape.chunk),
              wide = scratch.array<T>(direct ? 0 : shape.slots * N * shape.chunk);
  TileProducts<T> products(scratch, shape, x, weight, T(eps));
  allocate(scratch);
  T *x_hat = data_of<T>(features), *x_inverse = data_of<T>(x_norms), *w_inverse = data_of<T>(w_norms),
    *cells = data_of<T>(wide);
  unit_features(xs, N, normalize_input, T(eps), x_hat, x_inverse);
  for_rows(N, D, [&](int64_t i) {  // the scale goes onto the smaller operand
    for (int64_t d = 0; d < D; ++d) x_hat[i * D + d] *= T(scale);
  });
  products.take_features(
      x_hat, [&](int64_t i) { return x_inverse[i]; },
      [&](int64_t i) { return T(scale) * (normalize_input ? T(1) : T(1) / x_inverse[i]); });
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    products.begin(slot, tile, w_inverse + slot * shape.chunk);
    const Matrix<T> result = columns(outs, N, tile, direct ? nullptr : cells + slot * N * shape.chunk);
    products.scores(slot, result);
    if (!direct)
      for (int64_t i = 0; i < N; ++i)
        outs.kernel.store_as(result.data + i * tile.width, tile.width, T(1), cell(outs, i, tile.first));
  });
}

template <class T>
void backward(const Tensor& grad, const Tensor& x, const Tensor& weight, double scale, bool normalize_input,
              double eps, Tensor* dx, Tensor* dw, Tensor* dscale) {
  const HeadShape shape(x, weight, chunk_for(weight));
  const int64_t N = shape.batch, D = shape.dim;
  const Rows<T> xs(x, D), ws(weight, D), grads(grad, shape.classes);
  const bool direct = grad.element_size() == sizeof(T), need_rows = dx != nullptr || dscale != nullptr;
  const int64_t tile_values = shape.slots * shape.chunk * D;
  Block scratch;
  const Array features = scratch.array<T>(N * D), x_norms = scratch.array<T>(N),
              w_norms = scratch.array<T>(shape.slots * shape.chunk),
              gradients = scratch.array<T>(dw != nullptr ? tile_values : 0),
              wide = scratch.array<T>(direct ? 0 : shape.slots * N * shape.chunk),
              sums = scratch.array<T>(need_rows ? shape.slots * N * D : 0);
  TileProducts<T> products(scratch, shape, x, weight, T(eps));
  GradientProduct<T> gradient(scratch, shape, x, weight, dw != nullptr);
  allocate(scratch);
  T *x_hat = data_of<T>(features), *x_inverse = data_of<T>(x_norms), *w_inverse = data_of<T>(w_norms),
    *dw_hat = data_of<T>(gradients), *cells = data_of<T>(wide),
    *dx_hat = data_of<T>(sums);  // sum over j of G_ij w_hat_j, without s
  unit_features(xs, N, normalize_input, T(eps), x_hat, x_inverse);
  const auto inverse_of = [&](int64_t i) { return x_inverse[i]; };
  const auto factor_of = [&](int64_t i) { return normalize_input ? T(1) : T(1) / x_inverse[i]; };
  products.take_features(x_hat, inverse_of, factor_of);
  if (dw != nullptr) gradient.take_features(x_hat, inverse_of, factor_of, [](int64_t) { return T(1); });
  std::fill_n(dx_hat, sums.count(), T(0));
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* inverse = w_inverse + slot * shape.chunk;
    products.begin(slot, tile, inverse);
    const Matrix<T> g = columns(grads, N, tile, direct ? nullptr : cells + slot * N * shape.chunk);
    if (!direct)
      for (int64_t i = 0; i < N; ++i)
        grads.kernel.widen(cell(grads, i, tile.first), tile.width, T(1), g.data + i * tile.width);
    if (need_rows) products.add_weighted(slot, g, nullptr, {}, dx_hat + slot * N * D);
    if (dw == nullptr) return;
    const Rows<T> out(*dw, D);
    T* product = dw_hat + slot * shape.chunk * D;
    gradient(g, product);
    for (int64_t j = 0; j < tile.width; ++j) {
      T* unit = products.unit_row(slot, j);
      ws.kernel.project(unit, product + j * D, D, T(scale),
                        scale_again(ws, tile.first + j, inverse[j], T(eps), unit), T(eps),
                        out.row(tile.first + j));
    }
  });
  if (need_rows) add_slots(dx_hat, shape.slots, N * D);
  if (dscale != nullptr) {
    double total = 0;
    for (int64_t i = 0; i < N; ++i) total += dot_in_double(x_hat + i * D, dx_hat + i * D, D);
    *static_cast<double*>(dscale->mutable_data_ptr()) = total;
  }
  if (dx == nullptr) return;
  const Rows<T> out(*dx, D);
  for_rows(N, D, [&](int64_t i) {
    T* g = dx_hat + i * D;
    if (normalize_input)
      xs.kernel.project(x_hat + i * D, g, D, T(scale),
                        scale_again(xs, i, x_inverse[i], T(eps), x_hat + i * D), T(eps), out.row(i));
    else
      xs.kernel.store_as(g, D, T(scale), out.row(i));
  });
}

Tensor norm_linear(const NormLinearArguments& in) {
  const Tensor &x = in.x, &weight = in.weight;
  check_head(in.kName, x, weight);
  check_number(in.kName, "scale", in.scale, x);
  Tensor out = fresh({x.size(0), weight.size(0)}, x.scalar_type());
  const double s = number_argument(in.scale, in.scale_value);
  if (accumulator(x.scalar_type()) == ScalarType::Double)
    forward<double>(x, weight, s, in.normalize_input, in.eps, out);
  else
    forward<float>(x, weight, s, in.normalize_input, in.eps, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> norm_linear_backward(const NormLinearBackwardArguments& in) {
  const Tensor &grad = in.grad, &x = in.x, &weight = in.weight;
  check_head(in.kName, x, weight);
  check_number(in.kName, "scale", in.scale, x);
  check_exact(in.kName, "grad", grad, x.scalar_type(), {x.size(0), weight.size(0)});
  Tensor dx = in.need_x ? fresh_like(x) : fresh({0}, x.scalar_type());
  Tensor dw = in.need_weight ? fresh_like(weight) : fresh({0}, weight.scalar_type());
  Tensor ds = in.need_scale ? fresh({}, ScalarType::Double) : fresh({0}, ScalarType::Double);
  const double s = number_argument(in.scale, in.scale_value);
  const auto run = accumulator(x.scalar_type()) == ScalarType::Double ? backward<double> : backward<float>;
  run(grad, x, weight, s, in.normalize_input, in.eps, in.need_x ? &dx : nullptr,
      in.need_weight ? &dw : nullptr, in.need_scale ? &ds : nullptr);
  return {dx, dw, ds};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::cpu::norm_linear>(m);
  nf::implement<&nf::cpu::norm_linear_backward>(m);
}
