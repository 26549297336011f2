// The backward of the engine on the CPU: gradients from the rows' state and slopes, with a second sweep over the
// classes for dW, and for x_sum where the first one did not make it.
#include <cstring>

#include "cpu/head_launch.h"
#include "cpu/head_stages.h"
#include "cpu/row_terms.h"
#include "cpu/tile_products.h"
#include "engine/update_arguments.h"

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

// The labels of rows with a slope; those of others may be anything.
void check_targets(const char* op, const HeadBackwardTensors& in, const Labels& labels,
                   const std::vector<RowGradient>& gradients) {
  const int64_t C = in.weight.size(0);
  for (int64_t i = 0; i < labels.batch; ++i) {
    const int64_t label = labels.data[i];
    if (gradients[size_t(i)].any && (label < 0 || label >= C) && !(in.is_shard && label == kElsewhere))
      fail(op, ": expected `labels` in [0, ", C, ") where a row has slopes, got ", label, " at row ", i);
  }
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

// What every class of weight 1 gets from label smoothing; empty without.
template <class T>
std::vector<T> uniform_part(const std::vector<RowGradient>& gradients, const T* x_hat, int64_t dim,
                            bool wanted) {
  std::vector<T> uniform(size_t(wanted ? dim : 0), T(0));
  if (wanted)
    for (size_t i = 0; i < gradients.size(); ++i)
      accum_rows<T>().axpy(T(gradients[i].uniform), x_hat + int64_t(i) * dim, uniform.data(), dim);
  return uniform;
}

// What is to be made.
struct Wanted {
  bool x, weight, scale;
  const HeadUpdateArguments* update;  // or null: what the weight's gradient goes into, instead of dW
};

// Unit rows of the features, and what the second sweep needs: products of a tile, with its unit rows if it meets them
// (a row else), their gradient, a tile's cells, and the sum over the classes where the first sweep did not make it.
template <class T>
struct BackwardScratch {
  Block block;
  bool make_sum;  // x_sum
  std::optional<TileProducts<T>> units;
  GradientProduct<T> gradient;
  Array x_hat, unit_row, product, scores, x_sum, x_sums;
  Array class_row;  // of dW, a class of every slot, where there is no dW

  BackwardScratch(const HeadShape& shape, const HeadBackwardTensors& in, const Wanted& wanted)
      : make_sum(wanted.x && in.x_sum.numel() == 0), gradient(block, shape, in.x, in.weight, wanted.weight) {
    const int64_t rows = shape.batch * shape.dim, tiles = shape.slots * shape.chunk;
    const bool sweeps = wanted.weight || make_sum;
    x_hat = block.array<T>(rows);
    if (sweeps && (make_sum || in.stored.numel() == 0))
      units.emplace(block, shape, in.x, in.weight, T(in.eps));
    else
      unit_row = block.array<T>(sweeps ? shape.slots * shape.dim : 0);
    product = block.array<T>(wanted.weight ? tiles * shape.dim : 0);
    scores = block.array<T>(sweeps ? tiles * shape.batch : 0);
    x_sum = block.array<T>(make_sum ? rows : 0);
    x_sums = SlotSum<T>::room(block, make_sum, shape.slots, rows);
    class_row = block.array<T>(wanted.update != nullptr ? shape.slots * shape.dim : 0);
    allocate(block);
  }
};

// Takes row j of dW, stored as the weight is. Nothing reads row j of the weight after that.
template <class T>
void take_row(const HeadUpdateArguments& in, const Rows<T>& weight, int64_t j, const void* row) {
  const int64_t at = j * weight.length * weight.kernel.item;
  const auto state = [&](const std::optional<Tensor>& t) { return t ? data_of<char>(*t) + at : nullptr; };
  weight.kernel.update(in.update, in.by, row, weight.row(j), state(in.state1), state(in.state2),
                       weight.length);
}

// What the second sweep over the classes makes: dW, and x_sum where the first did not.
template <class T>
struct Backward {
  const HeadShape& shape;
  const Rows<T>& weight;
  const Labels& labels;
  const RowTerms<T>& terms;
  const std::vector<RowGradient>& gradients;
  const RowState& rows;
  const T* inverse_norm;
  const ClassWeights<T>& class_weight;
  T eps;
  T* x_hat;
  T* stored;  // or null: the coefficients are made again
  bool smooth;

  void sweep(BackwardScratch<T>& scratch, const Wanted& wanted, const Tensor& dw, T* x_sum) const {
    const int64_t N = shape.batch, D = shape.dim;
    const std::vector<int64_t> order = rows_by_label(labels, gradients);
    const std::vector<T> uniform = uniform_part(gradients, x_hat, D, wanted.weight && smooth);
    T *product = data_of<T>(scratch.product), *scores = data_of<T>(scratch.scores);
    const auto inverse_of = [&](int64_t i) { return gradients[size_t(i)].any ? rows[kInverseNorm][i] : 0.0; };
    if (scratch.units) scratch.units->take_features(x_hat, inverse_of, [](int64_t) { return 1.0; });
    if (wanted.weight)
      scratch.gradient.take_features(
          x_hat, inverse_of, [](int64_t) { return 1.0; },
          [&](int64_t i) { return gradients[size_t(i)].others; });
    const SlotSum<T> into(x_sum, scratch.x_sums, shape.slots, N * D);
    shape.for_tiles([&](int64_t slot, const Tile& tile) {
      T* e = scores + slot * N * shape.chunk;
      const Matrix<T> cells{e, N, tile.width, tile.width};
      if (scratch.units) scratch.units->begin_again(slot, tile, inverse_norm + tile.first);
      if (stored == nullptr) {
        scratch.units->scores(slot, cells);
        fold_tile(labels, terms, tile, e, [](int64_t, const auto&) {});
      } else {
        // Read in order it comes from memory far faster than column by column, as the product would.
        std::copy_n(stored + N * tile.first, N * tile.width, e);
      }
      if (into)
        scratch.units->add_weighted(slot, cells, terms.largest != nullptr ? rows[kSum] : nullptr, terms.rows,
                                    into.of(slot));
      if (!wanted.weight) return;
      // Not where dW will be: that memory is cold, and is to be written once.
      T* g = product + slot * shape.chunk * D;
      scratch.gradient(cells, g);
      add_targets(order, tile, g);
      const Rows<T> out(dw, D);
      T* unit = scratch.units ? scratch.units->spare_row(slot) : data_of<T>(scratch.unit_row) + slot * D;
      for (int64_t j = 0; j < tile.width; ++j) {
        T* gradient = g + tile.column(j) * D;
        if (!uniform.empty())
          accum_rows<T>().axpy(T(class_weight[tile.first + j]), uniform.data(), gradient, D);
        const int64_t row = tile.first + j;
        if (wanted.update == nullptr) {
          finish_row(row, gradient, unit, out.row(row));
        } else {
          T* class_row = data_of<T>(scratch.class_row) + slot * D;
          finish_row(row, gradient, unit, class_row);
          take_row(*wanted.update, weight, row, class_row);
        }
      }
    });
    into.join();
  }

 private:
  // The gradient of row j of W from that of its unit row; y is a row of scratch.
  void finish_row(int64_t j, const T* gradient, T* y, void* out) const {
    const T inverse = inverse_norm[j];
    if (math::inverse_serves(inverse)) {
      weight.kernel.project_stored(weight.row(j), gradient, shape.dim, inverse, eps, out);
      return;
    }
    const math::RowScale<T> scale = weight.kernel.normalize_wide(weight.row(j), shape.dim, 2, eps, y);
    weight.kernel.project(y, gradient, shape.dim, T(1), scale, eps, out);
  }

  void add_targets(const std::vector<int64_t>& order, const Tile& tile, T* g) const {
    const int64_t D = shape.dim;
    auto row = std::lower_bound(order.begin(), order.end(), tile.first,
                                [&](int64_t i, int64_t first) { return labels.data[i] < first; });
    for (; row != order.end() && labels.data[*row] < tile.first + tile.width; ++row)
      accum_rows<T>().axpy(T(gradients[size_t(*row)].target), x_hat + *row * D,
                           g + tile.column(labels.data[*row] - tile.first) * D, D);
  }
};

template <class T>
void backward(const char* op, const HeadBackwardTensors& in, const Wanted& wanted, const Tensor& dx,
              const Tensor& dw, const Tensor& dscale) {
  const HeadShape shape = in.stored.numel() > 0 ? shape_of_stored<T>(op, in) : shape_of(op, in, false);
  const int64_t N = shape.batch, D = shape.dim;
  const Rows<T> xs(in.x, D), ws(in.weight, D);
  const Labels labels(in.labels);
  const RowState rows(in.rows);
  const T* inverse = data_of<const T>(in.inverse_norm);
  const std::vector<RowGradient> gradients = row_gradients<T>(RowSlopes(in.slopes), in.grad_loss);
  check_targets(op, in, labels, gradients);
  BackwardScratch<T> scratch(shape, in, wanted);
  T* x_hat = data_of<T>(scratch.x_hat);
  for_rows(N, D, [&](int64_t i) {
    if (gradients[size_t(i)].any)
      unit_row_again(xs, i, T(rows[kInverseNorm][i]), T(in.eps), x_hat + i * D);
    else
      std::fill_n(x_hat + i * D, D, T(0));
  });
  if (wanted.scale) {
    double* ds = static_cast<double*>(dscale.mutable_data_ptr());
    const int64_t step = dscale.dim() == 0 ? 0 : 1;
    std::fill_n(ds, dscale.numel(), 0.0);
    for (int64_t i = 0; i < N; ++i) ds[i * step] += gradients[size_t(i)].scale;
  }
  const RowTerms<T> terms(
      in, RowNumbers(in.scale, in.scale_value), [&](int64_t i) { return gradients[size_t(i)].any; },
      [&](int64_t i) { return rows[kShift][i]; });
  const ClassWeights<T> class_weight(in.class_weight);
  const Backward<T> second{shape,
                           ws,
                           labels,
                           terms,
                           gradients,
                           rows,
                           inverse,
                           class_weight,
                           T(in.eps),
                           x_hat,
                           data_of<T>(in.stored),
                           in.class_sum.numel() > 0};
  T* own_sum = data_of<T>(scratch.x_sum);
  if (wanted.weight || scratch.make_sum) second.sweep(scratch, wanted, dw, own_sum);
  if (wanted.x)
    grad_features(xs, ws, labels, inverse, gradients, rows, x_hat,
                  scratch.make_sum ? own_sum : data_of<T>(in.x_sum), data_of<T>(in.class_sum), T(in.eps),
                  Rows<T>(dx, D));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gradients_of(const HeadBackwardArguments& in) {
  const bool per_row = in.scale && in.scale->dim() == 1;
  Tensor dx = partial_gradient_like(in.x, in.need_x, in.is_shard);
  if (!in.need_x && in.is_shard) dx = fresh({0}, accumulator(in.x.scalar_type()));
  Tensor dw = gradient_like(in.weight, in.need_weight);
  Tensor ds = !in.need_scale ? fresh({0}, ScalarType::Double)
              : per_row      ? fresh({in.x.size(0)}, ScalarType::Double)
                             : fresh({}, ScalarType::Double);
  const auto run = accumulator(in.x.scalar_type()) == ScalarType::Double ? backward<double> : backward<float>;
  run(in.kName, in, {in.need_x, in.need_weight, in.need_scale, nullptr}, dx, dw, ds);
  return {dx, dw, ds};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> head_backward(const HeadBackwardArguments& in) {
  check_backward(in.kName, in);
  return gradients_of(in);
}

void head_backward_update(const HeadUpdateArguments& in) {
  check_update(in);
  const auto run = accumulator(in.x.scalar_type()) == ScalarType::Double ? backward<double> : backward<float>;
  // Without the features' gradient, which reads the rows of the labels.
  run(in.kName, in, {false, true, false, &in}, in.x, in.weight, in.x);
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::cpu::head_backward>(m);
  nf::implement<&nf::cpu::head_backward_update>(m);
}
