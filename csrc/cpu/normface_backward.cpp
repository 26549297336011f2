// Last stage of the fused head on the CPU: gradients from the rows' state, with a second sweep over the
// classes for dW.
#include <cstring>
#include <numeric>

#include "cpu/normface.h"

namespace nf::cpu {
namespace {

// What row i contributes to the gradients, upstream gradient and scale included.
struct RowGradient {
  double others;   // factor of x_sum, and of E x_hat in dW
  double target;   // d loss / d cosine of the target
  double uniform;  // factor of class_sum in dx, and of class_weight_j x_hat in dW
  double scale;    // d loss / d scale
};

template <class T>
std::vector<RowGradient> row_gradients(const RowState& rows, double scale, double uniform,
                                       const Tensor& grad_loss) {
  const T* upstream = static_cast<const T*>(grad_loss.const_data_ptr());
  const int64_t step = grad_loss.dim() == 0 ? 0 : 1;
  std::vector<RowGradient> result(size_t(rows.batch), RowGradient{0, 0, 0, 0});
  for (int64_t i = 0; i < rows.batch; ++i) {
    if (rows[kRowWeight][i] == 0.0) continue;
    const double g = double(upstream[i * step]) * rows[kRowWeight][i];
    const math::RowSoftmax row = softmax_of(rows, scale, i);
    const math::SmoothingTerms weights = smoothing_of(rows, i);
    result[size_t(i)] = {g * scale * math::others_slope(row, weights),
                         g * scale * math::target_slope(row, weights, rows[kPsiSlope][i]),
                         -g * scale * uniform,
                         g * math::scale_slope(row, weights, rows[kSumCosine][i], rows[kPsi][i])};
  }
  return result;
}

template <class T>
void grad_features(const Rows<T>& x, const Rows<T>& w, const Labels& labels, const T* inverse_norm,
                   const std::vector<RowGradient>& gradients, const RowState& rows, T* x_hat, const T* x_sum,
                   const T* class_sum, T eps, const Rows<T>& dx) {
  for_rows(labels.batch, x.length, [&](int64_t i) {
    if (rows[kRowWeight][i] == 0.0) {  // no gradient, whatever the row or a class holds
      std::memset(dx.row(i), 0, size_t(x.length * dx.kernel.item));
      return;
    }
    const RowGradient& row = gradients[size_t(i)];
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
std::vector<int64_t> rows_by_label(const Labels& labels, const RowState& rows) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < labels.batch; ++i)
    if (rows[kRowWeight][i] != 0.0 && labels.data[i] != kElsewhere) order.push_back(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return labels.data[a] < labels.data[b]; });
  return order;
}

template <class T>
void grad_weight(const HeadShape& shape, const Rows<T>& w, const Labels& labels, double scale,
                 const T* inverse_norm, const std::vector<RowGradient>& gradients, const RowState& rows,
                 const ClassWeights<T>& class_weight, bool smooth, T eps, T* x_hat, T* stored,
                 const Tensor& dw) {
  const int64_t N = shape.batch, D = shape.dim;
  const Rows<T> out(dw, D);
  const bool direct = dw.element_size() == sizeof(T);  // the product can go where the result will be
  const std::vector<int64_t> order = rows_by_label(labels, rows);
  Buffer<T> weighted(N * D);  // the rows of x_hat times their factor
  for_rows(N, D, [&](int64_t i) {
    for (int64_t d = 0; d < D; ++d)
      weighted.data[i * D + d] = T(gradients[size_t(i)].others) * x_hat[i * D + d];
  });
  std::vector<T> uniform(size_t(smooth ? D : 0), T(0));  // of class weight 1
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
      exponentiate<T>(shape, labels, rows[kShift], scale, tile, e, nullptr, nullptr);
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

struct BackwardArguments {
  Tensor grad_loss, x, weight, labels;
  double scale;
  double eps;
  int64_t class_chunk;
  Tensor rows, inverse_norm, x_sum, class_sum, stored;
  std::optional<Tensor> class_weight;
  double smoothing;
  int64_t total_classes;
};

template <class T>
void backward(const BackwardArguments& in, Tensor* dx, Tensor* dw, Tensor* dscale) {
  const HeadShape shape(in.x, in.weight, in.class_chunk);
  const int64_t N = shape.batch, D = shape.dim;
  const Rows<T> xs(in.x, D), ws(in.weight, D);
  const Labels labels(in.labels);
  const RowState rows = row_state(in.rows);
  const T* inverse = static_cast<const T*>(in.inverse_norm.const_data_ptr());
  const std::vector<RowGradient> gradients =
      row_gradients<T>(rows, in.scale, in.smoothing / double(in.total_classes), in.grad_loss);
  Buffer<T> x_hat(N * D);
  for_rows(N, D, [&](int64_t i) {  // zero where the row does not count, even if it holds NaN
    if (rows[kRowWeight][i] != 0.0)
      unit_row_again(xs, i, T(rows[kInverseNorm][i]), T(in.eps), x_hat.data + i * D);
    else
      std::fill_n(x_hat.data + i * D, D, T(0));
  });
  if (dscale != nullptr)
    *static_cast<double*>(dscale->mutable_data_ptr()) =
        std::accumulate(gradients.begin(), gradients.end(), 0.0,
                        [](double sum, const RowGradient& row) { return sum + row.scale; });
  if (dx != nullptr)
    grad_features(xs, ws, labels, inverse, gradients, rows, x_hat.data, data_of<T>(in.x_sum),
                  data_of<T>(in.class_sum), T(in.eps), Rows<T>(*dx, D));
  if (dw != nullptr)
    grad_weight(shape, ws, labels, in.scale, inverse, gradients, rows, ClassWeights<T>(in.class_weight),
                in.smoothing > 0, T(in.eps), x_hat.data, data_of<T>(in.stored), *dw);
}

std::tuple<Tensor, Tensor, Tensor> normface_backward(
    Tensor grad_loss, Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> scale, double scale_value,
    double eps, int64_t class_chunk, Tensor rows, Tensor inverse_norm, Tensor x_sum, Tensor class_sum,
    Tensor stored, bool need_x, bool need_weight, bool need_scale, int64_t /*kernels*/,
    ScalarType /*product_precision*/, std::optional<Tensor> class_weight, double smoothing,
    int64_t total_classes, bool is_shard) {
  const char* op = "normface_backward";
  check_head(op, x, weight, is_shard ? 0 : 1);
  check_number(op, "scale", scale, x);
  check_labels(op, labels, x.size(0));
  check_shape(op, "rows", rows, kRowFields, x.size(0));
  check_weights(op, "class_weight", class_weight, x, weight.size(0));
  if (need_x) check_shape(op, "x_sum", x_sum, x.size(0), x.size(1));
  const ScalarType x_type = is_shard ? accumulator(x.scalar_type()) : x.scalar_type();
  Tensor dx = need_x ? fresh({x.size(0), x.size(1)}, x_type) : fresh({0}, x_type);
  Tensor dw = need_weight ? fresh_like(weight) : fresh({0}, weight.scalar_type());
  Tensor ds = need_scale ? fresh({}, ScalarType::Double) : fresh({0}, ScalarType::Double);
  const BackwardArguments in{
      grad_loss, x,           weight,       labels,       number_argument(scale, scale_value),
      eps,       class_chunk, rows,         inverse_norm, x_sum,
      class_sum, stored,      class_weight, smoothing,    total_classes};
  const auto run = accumulator(x.scalar_type()) == ScalarType::Double ? backward<double> : backward<float>;
  run(in, need_x ? &dx : nullptr, need_weight ? &dw : nullptr, need_scale ? &ds : nullptr);
  return {dx, dw, ds};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) { m.impl("normface_backward", TORCH_BOX(&nf::cpu::normface_backward)); }
