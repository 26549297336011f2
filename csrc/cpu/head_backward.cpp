// The backward of the engine on the CPU: gradients from the rows' state and slopes, with a second sweep over the
// classes for dW, and for x_sum where the first one did not make it.
#include <cstring>

#include "cpu/head_launch.h"
#include "cpu/row_terms.h"
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

// What meets the coefficients: the rows of x_hat times their factor.
template <class T>
void weigh_rows(const std::vector<RowGradient>& gradients, const T* x_hat, int64_t dim, T* weighted) {
  for_rows(int64_t(gradients.size()), dim, [&](int64_t i) {
    for (int64_t d = 0; d < dim; ++d)
      weighted[i * dim + d] = T(gradients[size_t(i)].others) * x_hat[i * dim + d];
  });
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

// Where the rows of dW go: into dW, where the products of a tile can lie before if its type is theirs.
template <class T>
struct StoredGradient {
  Rows<T> dw;

  T* product(const Tile& tile) const { return static_cast<T*>(dw.row(tile.first)); }
  template <class Write>
  void put(int64_t, int64_t j, const Write& write) const {
    write(dw.row(j));
  }
};

// Or, as soon as a tile is done, into a rule (math/update.h).
template <class T>
struct UpdatedRows {
  const HeadUpdateArguments& in;
  Rows<T> weight;
  Buffer<T> row;  // [slots, D]: one of dW, in the weight's type
  char *state1, *state2;

  UpdatedRows(const HeadUpdateArguments& of, int64_t slots)
      : in(of),
        weight(of.weight, of.weight.size(1)),
        row(slots * weight.length),
        state1(of.state1 ? data_of<char>(*of.state1) : nullptr),
        state2(of.state2 ? data_of<char>(*of.state2) : nullptr) {}

  T* product(const Tile&) const { return nullptr; }
  template <class Write>
  void put(int64_t slot, int64_t j, const Write& write) const {
    const int64_t at = j * weight.length * weight.kernel.item;
    T* g = row.data + slot * weight.length;
    write(g);
    weight.kernel.update(in.update, in.by, g, weight.row(j), state1 ? state1 + at : nullptr,
                         state2 ? state2 + at : nullptr, weight.length);
  }
};

// What the second sweep over the classes makes: dW, and x_sum where the first did not.
template <class T>
struct Backward {
  const HeadShape& shape;
  const Rows<T>& weight;
  const Labels& labels;
  const RowTerms<T>& terms;
  const std::vector<RowGradient>& gradients;
  const T* inverse_norm;
  const ClassWeights<T>& class_weight;
  T eps;
  T* x_hat;
  T* stored;  // or null: the coefficients are made again
  bool smooth;

  // `gradient` takes the rows of dW, or is null; `direct`: the products of a tile go where it says.
  template <class Gradient>
  void sweep(const Gradient* gradient, bool direct, T* x_sum) const {
    const int64_t N = shape.batch, D = shape.dim;
    const bool dw = gradient != nullptr;
    const std::vector<int64_t> order = rows_by_label(labels, gradients);
    const std::vector<T> uniform = uniform_part(gradients, x_hat, D, dw && smooth);
    Buffer<T> weighted(dw ? N * D : 0);
    if (dw) weigh_rows(gradients, x_hat, D, weighted.data);
    Buffer<T> w_hat(shape.slots * shape.chunk * D);
    Buffer<T> product(dw && !direct ? shape.slots * shape.chunk * D : 0);
    Buffer<T> scores(stored != nullptr ? 0 : shape.slots * N * shape.chunk);
    const SlotSum<T> into(x_sum, shape.slots, N * D);
    shape.for_tiles([&](int64_t slot, const Tile& tile) {
      T* unit = w_hat.data + slot * shape.chunk * D;
      T* e = stored != nullptr ? stored + N * tile.first : scores.data + slot * N * shape.chunk;
      for (int64_t j = 0; j < tile.width; ++j)
        unit_row_again(weight, tile.first + j, inverse_norm[tile.first + j], eps, unit + tile.column(j) * D);
      if (stored == nullptr) {
        score_tile(shape, x_hat, unit, tile, e);
        fold_tile(labels, terms, tile, e, [](int64_t, const auto&) {});
      }
      if (into)
        multiply<T>({e, N, tile.width, tile.width}, {unit, tile.width, D, D}, {into.of(slot), N, D, D}, true);
      if (!dw) return;
      T* g = direct ? gradient->product(tile) : product.data + slot * shape.chunk * D;
      multiply<T>(Matrix<T>{e, N, tile.width, tile.width}.transposed(), {weighted.data, N, D, D},
                  {g, tile.width, D, D});
      add_targets(order, tile, g);
      for (int64_t j = 0; j < tile.width; ++j) {
        T *w = unit + tile.column(j) * D, *of_class = g + tile.column(j) * D;
        if (!uniform.empty())
          accum_rows<T>().axpy(T(class_weight[tile.first + j]), uniform.data(), of_class, D);
        const auto scale = scale_again(weight, tile.first + j, inverse_norm[tile.first + j], eps, w);
        gradient->put(slot, tile.first + j,
                      [&](void* out) { weight.kernel.project(w, of_class, D, T(1), scale, eps, out); });
      }
    });
    into.join();
  }

 private:
  void add_targets(const std::vector<int64_t>& order, const Tile& tile, T* g) const {
    const int64_t D = shape.dim;
    auto row = std::lower_bound(order.begin(), order.end(), tile.first,
                                [&](int64_t i, int64_t first) { return labels.data[i] < first; });
    for (; row != order.end() && labels.data[*row] < tile.first + tile.width; ++row)
      accum_rows<T>().axpy(T(gradients[size_t(*row)].target), x_hat + *row * D,
                           g + tile.column(labels.data[*row] - tile.first) * D, D);
  }
};

// What both ops make of the rows before they go over the classes.
template <class T>
struct Prepared {
  HeadShape shape;
  int64_t batch, dim;
  Rows<T> xs, ws;
  Labels labels;
  RowState rows;
  const T* inverse;
  std::vector<RowGradient> gradients;
  Buffer<T> x_hat;
  RowTerms<T> terms;
  ClassWeights<T> class_weight;
  T eps;
  T* stored;
  bool smooth;

  Prepared(const char* op, const HeadBackwardTensors& in)
      : shape(in.stored.numel() > 0 ? shape_of_stored<T>(op, in) : shape_of(op, in, false)),
        batch(shape.batch),
        dim(shape.dim),
        xs(in.x, dim),
        ws(in.weight, dim),
        labels(in.labels),
        rows(in.rows),
        inverse(data_of<const T>(in.inverse_norm)),
        gradients(row_gradients<T>(RowSlopes(in.slopes), in.grad_loss)),
        x_hat(batch * dim),
        terms(
            in, RowNumbers(in.scale, in.scale_value), [&](int64_t i) { return gradients[size_t(i)].any; },
            [&](int64_t i) { return rows[kShift][i]; }),
        class_weight(in.class_weight),
        eps(T(in.eps)),
        stored(data_of<T>(in.stored)),
        smooth(in.class_sum.numel() > 0) {
    check_targets(op, in, labels, gradients);
    for_rows(batch, dim, [&](int64_t i) {
      if (gradients[size_t(i)].any)
        unit_row_again(xs, i, T(rows[kInverseNorm][i]), eps, x_hat.data + i * dim);
      else
        std::fill_n(x_hat.data + i * dim, dim, T(0));
    });
  }

  Backward<T> second() const {
    return {shape, ws, labels, terms, gradients, inverse, class_weight, eps, x_hat.data, stored, smooth};
  }
};

template <class T>
void backward(const HeadBackwardArguments& in, const Tensor& dx, const Tensor& dw, const Tensor& dscale) {
  const Prepared<T> made(in.kName, in);
  const int64_t N = made.batch, D = made.dim;
  if (in.need_scale) {
    double* ds = static_cast<double*>(dscale.mutable_data_ptr());
    const int64_t step = dscale.dim() == 0 ? 0 : 1;
    std::fill_n(ds, dscale.numel(), 0.0);
    for (int64_t i = 0; i < N; ++i) ds[i * step] += made.gradients[size_t(i)].scale;
  }
  const bool make_sum = in.need_x && in.x_sum.numel() == 0;
  Buffer<T> own_sum(make_sum ? N * D : 0);
  const bool direct = in.need_weight && dw.element_size() == sizeof(T) && made.shape.centers == 1;
  const StoredGradient<T> gradient{Rows<T>(dw, D)};
  if (in.need_weight || make_sum)
    made.second().sweep(in.need_weight ? &gradient : nullptr, direct, make_sum ? own_sum.data : nullptr);
  if (in.need_x)
    grad_features(made.xs, made.ws, made.labels, made.inverse, made.gradients, made.rows, made.x_hat.data,
                  make_sum ? own_sum.data : data_of<T>(in.x_sum), data_of<T>(in.class_sum), made.eps,
                  Rows<T>(dx, D));
}

template <class T>
void update(const HeadUpdateArguments& in) {
  const Prepared<T> made(in.kName, in);
  const UpdatedRows<T> rows(in, made.shape.slots);
  made.second().sweep(&rows, false, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> head_backward(const HeadBackwardArguments& in) {
  check_backward(in.kName, in);
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

void head_backward_update(const HeadUpdateArguments& in) {
  check_update(in);
  const auto run = accumulator(in.x.scalar_type()) == ScalarType::Double ? update<double> : update<float>;
  run(in);
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::cpu::head_backward>(m);
  nf::implement<&nf::cpu::head_backward_update>(m);
}
