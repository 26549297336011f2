// Last stage of the fused head on the CPU: gradients from the rows' state, with a second sweep over the
// classes for dW.
#include <cstring>

#include "cpu/row_terms.h"

namespace nf::cpu {
namespace {

// What row i contributes to the gradients, upstream gradient included.
struct RowGradient {
  double others;   // factor of x_sum, and of E x_hat in dW
  double target;   // d loss / d cosine of the target
  double uniform;  // factor of class_sum in dx, and of class_weight_j x_hat in dW
  double scale;    // d loss / d scale
  bool any;        // a row without a slope is taken as zero: nothing it holds, NaN included, reaches a class
};

template <class T>
std::vector<RowGradient> row_gradients(const RowSlopes& slopes, const Tensor& grad_loss) {
  const T* upstream = static_cast<const T*>(grad_loss.const_data_ptr());
  const int64_t step = grad_loss.dim() == 0 ? 0 : 1;
  std::vector<RowGradient> result(size_t(slopes.batch), RowGradient{0, 0, 0, 0, false});
  for (int64_t i = 0; i < slopes.batch; ++i) {
    const double g = double(upstream[i * step]);
    const double others = slopes[kOthersSlope][i], target = slopes[kTargetSlope][i],
                 uniform = slopes[kUniformSlope][i], scale = slopes[kScaleSlope][i];
    if (others != 0.0 || target != 0.0 || uniform != 0.0 || scale != 0.0)
      result[size_t(i)] = {g * others, g * target, g * uniform, g * scale, true};
  }
  return result;
}

template <class T>
void grad_features(const Rows<T>& x, const Rows<T>& w, const Labels& labels, const T* inverse_norm,
                   const std::vector<RowGradient>& gradients, const RowState& rows, T* x_hat, const T* x_sum,
                   const T* class_sum, T eps, const Rows<T>& dx) {
  for_rows(labels.batch, x.length, [&](int64_t i) {
    const RowGradient& row = gradients[size_t(i)];
    if (!row.any) {  // no gradient, whatever the row or a class holds
      std::memset(dx.row(i), 0, size_t(x.length * dx.kernel.item));
      return;
    }
    std::vector<T> g(size_t(x.length), T(0));
    const int64_t label = labels.data[i];
    if (label != kElsewhere) unit_row_again(w, label, inverse_norm[label], eps, g.data());
    for (int64_t d = 0; d < x.length; ++d)
      g[size_t(d)] = T(row.others) * x_sum[i * x.length + d] + T(row.target) * g[size_t(d)];
    if (class_sum != nullptr) accum_rows<T>().axpy(T(row.uniform), class_sum, g.data(), x.length);
    const auto scale = scale_again(x, i, T(rows[kInverseNorm][i]), eps, x_hat + i * x.length);
    dx.kernel.project(x_hat + i * x.length, g.data(), x.length, T(1), scale, eps, dx.row(i));
  });
}

// Rows whose target is here, by label and then by row: those of a tile are neighbours.
std::vector<int64_t> rows_by_label(const Labels& labels, const std::vector<RowGradient>& gradients) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < labels.batch; ++i)
    if (gradients[size_t(i)].any && labels.data[i] != kElsewhere) order.push_back(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return labels.data[a] < labels.data[b]; });
  return order;
}

template <class T>
void grad_weight(const HeadShape& shape, const Rows<T>& w, const Labels& labels, const RowNumbers& scale,
                 const T* inverse_norm, const std::vector<RowGradient>& gradients, const double* shift,
                 const ClassWeights<T>& class_weight, bool uniform_part, T eps, T* x_hat, T* stored,
                 const Tensor& dw) {
  const int64_t N = shape.batch, D = shape.dim;
  const Rows<T> out(dw, D);
  const bool direct = dw.element_size() == sizeof(T);  // the product can go where the result will be
  const std::vector<int64_t> order = rows_by_label(labels, gradients);
  Buffer<T> weighted(N * D);  // the rows of x_hat times their factor
  for_rows(N, D, [&](int64_t i) {
    for (int64_t d = 0; d < D; ++d)
      weighted.data[i * D + d] = T(gradients[size_t(i)].others) * x_hat[i * D + d];
  });
  std::vector<T> uniform(size_t(uniform_part ? D : 0), T(0));  // of class weight 1
  if (!uniform.empty())
    for (int64_t i = 0; i < N; ++i)
      accum_rows<T>().axpy(T(gradients[size_t(i)].uniform), x_hat + i * D, uniform.data(), D);
  Buffer<T> w_hat(shape.slots * shape.chunk * D);
  Buffer<T> product(direct ? 0 : shape.slots * shape.chunk * D);
  Buffer<T> scores(stored != nullptr ? 0 : shape.slots * N * shape.chunk);
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* unit = w_hat.data + slot * shape.chunk * D;
    T* e = stored != nullptr ? stored + N * tile.first : scores.data + slot * N * shape.chunk;
    T* g = direct ? static_cast<T*>(out.row(tile.first)) : product.data + slot * shape.chunk * D;
    for (int64_t j = 0; j < tile.width; ++j)
      unit_row_again(w, tile.first + j, inverse_norm[tile.first + j], eps, unit + j * D);
    if (stored == nullptr) {
      score_tile(shape, x_hat, unit, tile, e);
      exponentiate<T>(shape, labels, shift, scale, tile, e, nullptr, nullptr);
    }
    multiply<T>(Matrix<T>{e, N, tile.width, tile.width}.transposed(), {weighted.data, N, D, D},
                {g, tile.width, D, D});
    auto row = std::lower_bound(order.begin(), order.end(), tile.first,
                                [&](int64_t i, int64_t first) { return labels.data[i] < first; });
    for (; row != order.end() && labels.data[*row] < tile.first + tile.width; ++row)
      accum_rows<T>().axpy(T(gradients[size_t(*row)].target), x_hat + *row * D,
                           g + (labels.data[*row] - tile.first) * D, D);
    if (!uniform.empty())
      for (int64_t j = 0; j < tile.width; ++j)
        accum_rows<T>().axpy(T(class_weight[tile.first + j]), uniform.data(), g + j * D, D);
    for (int64_t j = 0; j < tile.width; ++j)
      w.kernel.project(unit + j * D, g + j * D, D, T(1),
                       scale_again(w, tile.first + j, inverse_norm[tile.first + j], eps, unit + j * D), eps,
                       out.row(tile.first + j));
  });
}

template <class T>
void backward(const HeadBackwardArguments& in, const Tensor& dx, const Tensor& dw, const Tensor& dscale) {
  const HeadShape shape(in.x, in.weight, in.class_chunk);
  const int64_t N = shape.batch, D = shape.dim;
  const Rows<T> xs(in.x, D), ws(in.weight, D);
  const Labels labels(in.labels);
  const RowState rows(in.rows);
  const T* inverse = static_cast<const T*>(in.inverse_norm.const_data_ptr());
  const std::vector<RowGradient> gradients = row_gradients<T>(RowSlopes(in.slopes), in.grad_loss);
  Buffer<T> x_hat(N * D);
  for_rows(N, D, [&](int64_t i) {
    if (gradients[size_t(i)].any)
      unit_row_again(xs, i, T(rows[kInverseNorm][i]), T(in.eps), x_hat.data + i * D);
    else
      std::fill_n(x_hat.data + i * D, D, T(0));
  });
  if (in.need_scale) {
    double* ds = static_cast<double*>(dscale.mutable_data_ptr());
    const int64_t step = dscale.dim() == 0 ? 0 : 1;
    std::fill_n(ds, dscale.numel(), 0.0);
    for (int64_t i = 0; i < N; ++i) ds[i * step] += gradients[size_t(i)].scale;
  }
  if (in.need_x)
    grad_features(xs, ws, labels, inverse, gradients, rows, x_hat.data, data_of<T>(in.x_sum),
                  data_of<T>(in.class_sum), T(in.eps), Rows<T>(dx, D));
  if (!in.need_weight) return;
  std::vector<double> shift(static_cast<size_t>(N));  // the scores of a zero row are 0
  for (int64_t i = 0; i < N; ++i) shift[size_t(i)] = gradients[size_t(i)].any ? rows[kShift][i] : 0.0;
  grad_weight(shape, ws, labels, RowNumbers(in.scale, in.scale_value), inverse, gradients, shift.data(),
              ClassWeights<T>(in.class_weight), in.class_sum.numel() > 0, T(in.eps), x_hat.data,
              data_of<T>(in.stored), dw);
}

std::tuple<Tensor, Tensor, Tensor> head_backward(const HeadBackwardArguments& in) {
  check_backward(in);
  const bool per_row = in.scale && in.scale->dim() == 1;
  Tensor dx = partial_gradient_like(in.x, in.need_x, in.is_shard);
  if (!in.need_x && in.is_shard) dx = fresh({0}, accumulator(in.x.scalar_type()));
  Tensor dw = gradient_like(in.weight, in.need_weight);
  Tensor ds = !in.need_scale ? fresh({0}, ScalarType::Double)
              : per_row      ? fresh({in.x.size(0)}, ScalarType::Double)
                             : fresh({}, ScalarType::Double);
  const auto run = accumulator(in.x.scalar_type()) == ScalarType::Double ? backward<double> : backward<float>;
  run(in, dx, dw, ds);
  return {dx, dw, ds};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) { nf::implement<&nf::cpu::head_backward>(m); }
