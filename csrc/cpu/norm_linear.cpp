// norm_linear, s * cos(x_i, w_j), and its backward on the CPU. Unit rows of the weight exist only as
// one tile per thread.
#include "cpu/head.h"
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

// x_hat[i] = factor x_i / ||x_i|| (or factor x_i), and 1 / ||x_i|| (or 1).
template <class T>
void unit_features(const Rows<T>& x, int64_t batch, bool normalize_input, T eps, T* x_hat, T* inverse) {
  for_rows(batch, x.length, [&](int64_t i) {
    T* row = x_hat + i * x.length;
    inverse[i] = T(1);
    if (normalize_input)
      unit_rows(x, Tile{i, 1}, eps, row, inverse + i);
    else
      x.kernel.widen(x.row(i), x.length, T(1), row);
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
  const Rows<T> xs(x, D), ws(weight, D), outs(out, shape.classes);
  const bool direct = out.element_size() == sizeof(T);
  Block scratch;
  const Array features = scratch.array<T>(N * D), x_norms = scratch.array<T>(N),
              units = scratch.array<T>(shape.slots * shape.chunk * D),
              w_norms = scratch.array<T>(shape.slots * shape.chunk),
              wide = scratch.array<T>(direct ? 0 : shape.slots * N * shape.chunk);
  allocate(scratch);
  T *x_hat = data_of<T>(features), *w_hat = data_of<T>(units), *w_inverse = data_of<T>(w_norms),
    *cells = data_of<T>(wide);
  unit_features(xs, N, normalize_input, T(eps), x_hat, data_of<T>(x_norms));
  for_rows(N, D, [&](int64_t i) {  // the scale goes onto the smaller operand
    for (int64_t d = 0; d < D; ++d) x_hat[i * D + d] *= T(scale);
  });
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* unit = w_hat + slot * shape.chunk * D;
    unit_rows(ws, tile, T(eps), unit, w_inverse + slot * shape.chunk);
    const Matrix<T> result = columns(outs, N, tile, direct ? nullptr : cells + slot * N * shape.chunk);
    multiply<T>({x_hat, N, D, D}, Matrix<T>{unit, tile.width, D, D}.transposed(), result);
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
              w_norms = scratch.array<T>(shape.slots * shape.chunk), units = scratch.array<T>(tile_values),
              products = scratch.array<T>(dw != nullptr ? tile_values : 0),
              wide = scratch.array<T>(direct ? 0 : shape.slots * N * shape.chunk),
              sums = scratch.array<T>(need_rows ? shape.slots * N * D : 0);
  allocate(scratch);
  T *x_hat = data_of<T>(features), *x_inverse = data_of<T>(x_norms), *w_inverse = data_of<T>(w_norms),
    *w_hat = data_of<T>(units), *dw_hat = data_of<T>(products), *cells = data_of<T>(wide),
    *dx_hat = data_of<T>(sums);  // sum over j of G_ij w_hat_j, without s
  unit_features(xs, N, normalize_input, T(eps), x_hat, x_inverse);
  std::fill_n(dx_hat, sums.count(), T(0));
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* unit = w_hat + slot * shape.chunk * D;
    T* inverse = w_inverse + slot * shape.chunk;
    unit_rows(ws, tile, T(eps), unit, inverse);
    const Matrix<T> g = columns(grads, N, tile, direct ? nullptr : cells + slot * N * shape.chunk);
    if (!direct)
      for (int64_t i = 0; i < N; ++i)
        grads.kernel.widen(cell(grads, i, tile.first), tile.width, T(1), g.data + i * tile.width);
    const Matrix<T> w{unit, tile.width, D, D};
    if (need_rows) multiply<T>(g, w, {dx_hat + slot * N * D, N, D, D}, true);
    if (dw == nullptr) return;
    const Rows<T> out(*dw, D);
    T* product = dw_hat + slot * shape.chunk * D;
    multiply<T>(g.transposed(), {x_hat, N, D, D}, {product, tile.width, D, D});
    for (int64_t j = 0; j < tile.width; ++j)
      ws.kernel.project(unit + j * D, product + j * D, D, T(scale),
                        scale_again(ws, tile.first + j, inverse[j], T(eps), unit + j * D), T(eps),
                        out.row(tile.first + j));
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
