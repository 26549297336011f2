// The fused scaled softmax head on the CPU: prepare, sweep, finish (normface_loss) and the sweep over
// the classes that makes dW (normface_loss_backward). See csrc/math/softmax.h for the formulas.
//
// A tile of scores is one BLAS call, is turned into E in place while it is in cache, and feeds the
// product that adds up x_sum. Stored E lies tile by tile: that of the tile at class f starts at N * f,
// row-major [N, width].
#include <numeric>

#include "cpu/head.h"
#include "math/margin.h"
#include "math/softmax.h"
#include "row_state.h"

namespace nf::cpu {
namespace {

// rows[field][i]
struct RowState {
  double* data;
  int64_t batch;
  double* operator[](RowField field) const { return data + field * batch; }
};

RowState row_state(const Tensor& rows) {
  return {static_cast<double*>(const_cast<void*>(rows.const_data_ptr())), rows.size(1)};
}

struct Labels {
  const int64_t* data;
  int64_t batch;

  explicit Labels(const Tensor& t)
      : data(static_cast<const int64_t*>(t.const_data_ptr())), batch(t.size(0)) {}

  void check(const char* op, int64_t classes, int64_t ignore_index) const {
    for (int64_t i = 0; i < batch; ++i)
      if (data[i] != ignore_index && (data[i] < 0 || data[i] >= classes))
        fail(op, ": expected `labels` in [0, ", classes, ") or ignore_index (", ignore_index, "), got ",
             data[i], " at row ", i);
  }
};

// Scores of one tile, [N, width] = x_hat w_hat^T.
template <class T>
void score_tile(const HeadShape& shape, T* x_hat, T* w_hat, const Tile& tile, T* scores) {
  multiply<T>({x_hat, shape.batch, shape.dim, shape.dim},
              Matrix<T>{w_hat, tile.width, shape.dim, shape.dim}.transposed(),
              {scores, shape.batch, tile.width, tile.width});
}

// Calls part(begin, end) for the columns of a tile other than the row's own target.
template <class Part>
void around_target(int64_t label, const Tile& tile, const Part& part) {
  const int64_t target = label - tile.first;
  if (target < 0 || target >= tile.width) return part(0, tile.width);
  part(0, target);
  part(target + 1, tile.width);
}

// scores -> E in place; sums, when given, receive S and A of this tile. The target's E is 0: its term
// is added apart, in the accumulator's precision and with its margin.
template <class T>
void exponentiate(const HeadShape& shape, const Labels& labels, const double* shift, double scale,
                  const Tile& tile, T* scores, double* sum, double* sum_cosine) {
  for (int64_t i = 0; i < shape.batch; ++i) {
    T* row = scores + i * tile.width;
    around_target(labels.data[i], tile, [&](int64_t begin, int64_t end) {
      const auto part = accum_rows<T>().exp_fold(row + begin, end - begin, T(scale), T(shift[i]));
      if (sum == nullptr) return;
      sum[i] += part.exp;
      sum_cosine[i] += part.exp_cosine;
    });
    const int64_t target = labels.data[i] - tile.first;
    if (target >= 0 && target < tile.width) row[target] = T(0);
  }
}

// sample_weight, class_weight and label smoothing; see math::RowWeights.
template <class T>
struct Weighting {
  const T* sample;   // [N] or null: all 1
  const T* classes;  // [C] or null: all 1
  double smoothing;

  double of_row(int64_t i) const { return sample != nullptr ? double(sample[i]) : 1.0; }
  double of_class(int64_t j) const { return classes != nullptr ? double(classes[j]) : 1.0; }
  double class_total(int64_t count) const {
    return classes != nullptr ? std::accumulate(classes, classes + count, 0.0) : double(count);
  }
};

// Unit features, their inverse norms, and the weight of each row's loss. An ignored row becomes zero,
// so that nothing it holds, NaN included, reaches another row or a class.
template <class T>
void prepare_rows(const Rows<T>& x, const Labels& labels, int64_t ignore_index, int64_t reduction,
                  const Weighting<T>& weighting, T eps, T* x_hat, const RowState& rows) {
  double kept = 0;
  for (int64_t i = 0; i < labels.batch; ++i)
    if (labels.data[i] != ignore_index) kept += weighting.of_row(i) * weighting.of_class(labels.data[i]);
  const double each = reduction != kMean ? 1.0 : kept != 0.0 ? 1.0 / kept : 0.0;
  for_rows(labels.batch, x.length, [&](int64_t i) {
    const bool ignored = labels.data[i] == ignore_index;
    T inverse = T(0);
    if (ignored)
      std::fill_n(x_hat + i * x.length, x.length, T(0));
    else
      unit_rows(x, i, 1, eps, x_hat + i * x.length, &inverse);
    rows[kInverseNorm][i] = inverse;
    rows[kRowWeight][i] = ignored ? 0.0 : each * weighting.of_row(i);
  });
}

// The target cosine, a dot product in double, and psi and psi' of it.
template <class T>
void target_cosines(const Rows<T>& w, const Labels& labels, const T* x_hat, T eps, const math::Margin& margin,
                    const RowState& rows) {
  for_rows(labels.batch, w.length, [&](int64_t i) {
    math::ValueAndSlope<double> psi{0.0, 0.0};
    double cosine = 0;
    if (rows[kRowWeight][i] != 0.0) {
      std::vector<T> unit(static_cast<size_t>(w.length));
      T inverse;
      unit_rows(w, labels.data[i], 1, eps, unit.data(), &inverse);
      cosine = dot_in_double(x_hat + i * w.length, unit.data(), w.length);
      psi = margin(cosine);
    }
    rows[kCosine][i] = cosine;
    rows[kPsi][i] = psi.value;
    rows[kPsiSlope][i] = psi.slope;
  });
}

// kappa of every row: one constant inside the window of softmax.h; outside it the row's largest logit
// among the other classes, which costs a sweep of its own.
template <class T>
void choose_shift(const HeadShape& shape, const Rows<T>& w, const Labels& labels, double scale, T eps,
                  T* x_hat, const RowState& rows) {
  const int64_t N = shape.batch, D = shape.dim;
  if (math::has_fixed_shift<T>(scale, double(shape.classes))) {
    std::fill_n(rows[kShift], N, math::fixed_shift<T>(scale, double(shape.classes)));
    return;
  }
  Buffer<T> w_hat(shape.slots * shape.chunk * D), inverse(shape.slots * shape.chunk);
  Buffer<T> scores(shape.slots * N * shape.chunk), largest(shape.slots * N);
  std::fill_n(largest.data, shape.slots * N, -T(INFINITY));
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* unit = w_hat.data + slot * shape.chunk * D;
    T* tile_scores = scores.data + slot * N * shape.chunk;
    unit_rows(w, tile.first, tile.width, eps, unit, inverse.data + slot * shape.chunk);
    score_tile(shape, x_hat, unit, tile, tile_scores);
    for (int64_t i = 0; i < N; ++i) {
      T& best = largest.data[slot * N + i];
      around_target(labels.data[i], tile, [&](int64_t begin, int64_t end) {
        const T* row = tile_scores + i * tile.width;
        best = std::max(best, accum_rows<T>().largest_scaled(row + begin, end - begin, T(scale)));
      });
    }
  });
  for (int64_t i = 0; i < N; ++i) {
    T best = largest.data[i];
    for (int64_t slot = 1; slot < shape.slots; ++slot) best = std::max(best, largest.data[slot * N + i]);
    rows[kShift][i] = best == -T(INFINITY) ? 0.0 : double(best);  // a single class has no others
  }
}

// S, A, x_sum, class_sum (U) and the stored E.
template <class T>
void sweep(const HeadShape& shape, const Rows<T>& w, const Labels& labels, const Weighting<T>& weighting,
           double scale, T eps, T* x_hat, const RowState& rows, T* inverse_norm, T* x_sum, T* class_sum,
           T* stored) {
  const int64_t N = shape.batch, D = shape.dim;
  Buffer<T> w_hat(shape.slots * shape.chunk * D);
  Buffer<T> scores(stored != nullptr ? 0 : shape.slots * N * shape.chunk);
  Buffer<double> sums(shape.slots * 2 * N);
  // The first slot adds straight into x_sum, the others into partners of it.
  Buffer<T> partners(x_sum != nullptr ? (shape.slots - 1) * N * D : 0);
  Buffer<T> class_sums(class_sum != nullptr ? shape.slots * D : 0);
  std::fill_n(sums.data, shape.slots * 2 * N, 0.0);
  std::fill_n(class_sums.data, class_sums.tensor.numel(), T(0));
  if (x_sum != nullptr) {
    std::fill_n(x_sum, N * D, T(0));
    std::fill_n(partners.data, (shape.slots - 1) * N * D, T(0));
  }
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* unit = w_hat.data + slot * shape.chunk * D;
    T* e = stored != nullptr ? stored + N * tile.first : scores.data + slot * N * shape.chunk;
    unit_rows(w, tile.first, tile.width, eps, unit, inverse_norm + tile.first);
    if (class_sum != nullptr)
      for (int64_t j = 0; j < tile.width; ++j)
        accum_rows<T>().axpy(T(weighting.of_class(tile.first + j)), unit + j * D, class_sums.data + slot * D,
                             D);
    score_tile(shape, x_hat, unit, tile, e);
    double* sum = sums.data + slot * 2 * N;
    exponentiate(shape, labels, rows[kShift], scale, tile, e, sum, sum + N);
    T* into = slot == 0 ? x_sum : partners.data + (slot - 1) * N * D;
    if (x_sum != nullptr)
      multiply<T>({e, N, tile.width, tile.width}, {unit, tile.width, D, D}, {into, N, D, D}, true);
  });
  add_slots(sums.data, shape.slots, 2 * N);
  std::copy_n(sums.data, N, rows[kSum]);
  std::copy_n(sums.data + N, N, rows[kSumCosine]);
  if (x_sum != nullptr)
    for_rows(N * D, shape.slots, [&](int64_t k) {
      for (int64_t slot = 0; slot + 1 < shape.slots; ++slot) x_sum[k] += partners.data[slot * N * D + k];
    });
  if (class_sum != nullptr) {
    add_slots(class_sums.data, shape.slots, D);
    std::copy_n(class_sums.data, D, class_sum);
  }
}

math::RowSoftmax softmax_of(const RowState& rows, double scale, int64_t i) {
  return math::softmax_row(rows[kSum][i], rows[kShift][i], scale * rows[kPsi][i]);
}

math::RowWeights weights_of(const RowState& rows, int64_t i) {
  return {rows[kTotal][i], rows[kSmooth][i], rows[kPull][i], rows[kPush][i]};
}

template <class T>
void weigh_rows(const Labels& labels, const Weighting<T>& weighting, int64_t classes, const T* x_hat,
                const T* class_sum, int64_t dim, const RowState& rows) {
  const double weight_sum = weighting.smoothing > 0 ? weighting.class_total(classes) : 0.0;
  for (int64_t i = 0; i < rows.batch; ++i) {
    const double target = rows[kRowWeight][i] != 0.0 ? weighting.of_class(labels.data[i]) : 0.0;
    const double with_sum = class_sum != nullptr ? dot_in_double(x_hat + i * dim, class_sum, dim) : 0.0;
    const math::RowWeights weights = math::row_weights(weighting.smoothing, double(classes), target,
                                                       weight_sum, rows[kPsi][i], rows[kCosine][i], with_sum);
    rows[kTotal][i] = weights.total;
    rows[kSmooth][i] = weights.smooth;
    rows[kPull][i] = weights.pull;
    rows[kPush][i] = weights.push;
  }
}

template <class T>
void reduce_loss(const RowState& rows, double scale, int64_t reduction, T* loss) {
  double total = 0;
  for (int64_t i = 0; i < rows.batch; ++i) {
    const double weight = rows[kRowWeight][i];
    const double weighted =
        weight == 0.0 ? 0.0 : weight * math::row_loss(softmax_of(rows, scale, i), weights_of(rows, i), scale);
    if (reduction == kNone) loss[i] = T(weighted);
    total += weighted;
  }
  if (reduction != kNone) *loss = T(total);
}

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
    const math::RowWeights weights = weights_of(rows, i);
    result[size_t(i)] = {g * scale * math::others_slope(row, weights),
                         g * scale * math::target_slope(row, weights, rows[kPsiSlope][i]),
                         -g * scale * uniform,
                         g * math::scale_slope(row, weights, rows[kSumCosine][i], rows[kPsi][i])};
  }
  return result;
}

template <class T>
void grad_features(const Rows<T>& x, const Rows<T>& w, const Labels& labels, const T* inverse_norm,
                   const std::vector<RowGradient>& gradients, const RowState& rows, const T* x_hat,
                   const T* x_sum, const T* class_sum, const Rows<T>& dx) {
  for_rows(labels.batch, x.length, [&](int64_t i) {
    const RowGradient& row = gradients[size_t(i)];
    std::vector<T> g(size_t(x.length), T(0));
    if (rows[kRowWeight][i] != 0.0) {  // an ignored row has no target
      unit_rows_again(w, labels.data[i], 1, inverse_norm, g.data());
      for (int64_t d = 0; d < x.length; ++d)
        g[size_t(d)] = T(row.others) * x_sum[i * x.length + d] + T(row.target) * g[size_t(d)];
      if (class_sum != nullptr) accum_rows<T>().axpy(T(row.uniform), class_sum, g.data(), x.length);
    }
    x.kernel.project(x_hat + i * x.length, g.data(), x.length, T(rows[kInverseNorm][i]), dx.row(i));
  });
}

// Rows that have a target, by label and then by row: those of a tile are neighbours.
std::vector<int64_t> rows_by_label(const Labels& labels, const RowState& rows) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < labels.batch; ++i)
    if (rows[kRowWeight][i] != 0.0) order.push_back(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return labels.data[a] < labels.data[b]; });
  return order;
}

template <class T>
void grad_weight(const HeadShape& shape, const Rows<T>& w, const Labels& labels, double scale,
                 const T* inverse_norm, const std::vector<RowGradient>& gradients, const RowState& rows,
                 const Weighting<T>& weighting, T* x_hat, T* stored, const Tensor& dw) {
  const int64_t N = shape.batch, D = shape.dim;
  const Rows<T> out(dw, D);
  const bool direct = dw.element_size() == sizeof(T);  // the product can go where the result will be
  const std::vector<int64_t> order = rows_by_label(labels, rows);
  Buffer<T> weighted(N * D);  // the rows of x_hat times their factor
  for_rows(N, D, [&](int64_t i) {
    for (int64_t d = 0; d < D; ++d)
      weighted.data[i * D + d] = T(gradients[size_t(i)].others) * x_hat[i * D + d];
  });
  std::vector<T> uniform(size_t(weighting.smoothing > 0 ? D : 0), T(0));  // of class weight 1
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
    unit_rows_again(w, tile.first, tile.width, inverse_norm, unit);
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
        accum_rows<T>().axpy(T(weighting.of_class(tile.first + j)), uniform.data(), g + j * D, D);
    for (int64_t j = 0; j < tile.width; ++j)
      w.kernel.project(unit + j * D, g + j * D, D, inverse_norm[tile.first + j], out.row(tile.first + j));
  });
}

template <class T>
Weighting<T> weighting_of(const std::optional<Tensor>& sample_weight,
                          const std::optional<Tensor>& class_weight, double smoothing) {
  const auto data = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
  };
  return {data(sample_weight), data(class_weight), smoothing};
}

// The arguments that forward and backward share, on their way to one instantiation per T.
struct LossArguments {
  Tensor x, weight, labels;
  double scale;
  int64_t class_chunk;
  std::optional<Tensor> sample_weight, class_weight;
  double smoothing;
};

struct ForwardResult {
  Tensor loss, rows, inverse_norm, x_sum, class_sum, stored;
};

template <class T>
T* data_or_null(const Tensor& t) {
  return t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <class T>
ForwardResult forward(const LossArguments& in, const math::Margin& margin, int64_t reduction,
                      int64_t ignore_index, double eps, bool store, bool need_x) {
  const HeadShape shape(in.x, in.weight, in.class_chunk);
  const int64_t N = shape.batch, D = shape.dim, C = shape.classes;
  const ScalarType wide = accumulator(in.x.scalar_type());
  const Rows<T> xs(in.x, D), ws(in.weight, D);
  const Labels labels(in.labels);
  const Weighting<T> weighting = weighting_of<T>(in.sample_weight, in.class_weight, in.smoothing);
  ForwardResult out{reduction == kNone ? fresh({N}, wide) : fresh({}, wide),
                    fresh({kRowFields, N}, ScalarType::Double),
                    fresh({C}, wide),
                    need_x ? fresh({N, D}, wide) : fresh({0}, wide),
                    fresh({in.smoothing > 0 ? D : 0}, wide),
                    fresh({store ? N * C : 0}, wide)};
  const RowState rows = row_state(out.rows);
  T* class_sum = data_or_null<T>(out.class_sum);
  Buffer<T> x_hat(N * D);
  prepare_rows(xs, labels, ignore_index, reduction, weighting, T(eps), x_hat.data, rows);
  target_cosines(ws, labels, x_hat.data, T(eps), margin, rows);
  choose_shift(shape, ws, labels, in.scale, T(eps), x_hat.data, rows);
  sweep(shape, ws, labels, weighting, in.scale, T(eps), x_hat.data, rows, data_or_null<T>(out.inverse_norm),
        data_or_null<T>(out.x_sum), class_sum, data_or_null<T>(out.stored));
  weigh_rows(labels, weighting, C, x_hat.data, class_sum, D, rows);
  if (out.loss.numel() > 0) reduce_loss(rows, in.scale, reduction, data_or_null<T>(out.loss));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normface_loss(
    Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> scale, double scale_value, double m1,
    double m2, double m3, int64_t reduction, int64_t ignore_index, double eps, int64_t class_chunk,
    bool store, bool need_x, int64_t /*score_kernel: a CUDA choice*/,
    ScalarType /*operand: CPU products are at least float32*/, std::optional<Tensor> sample_weight,
    std::optional<Tensor> class_weight, double smoothing) {
  const char* op = "normface_loss";
  check_head(op, x, weight);
  check_labels(op, labels, x.size(0));
  check_weights(op, "sample_weight", sample_weight, x, x.size(0));
  check_weights(op, "class_weight", class_weight, x, weight.size(0));
  Labels(labels).check(op, weight.size(0), ignore_index);
  const LossArguments in{x,           weight,        labels,       scale_of(scale, scale_value),
                         class_chunk, sample_weight, class_weight, smoothing};
  const math::Margin margin{m1, m2, m3};
  const auto run = accumulator(x.scalar_type()) == ScalarType::Double ? forward<double> : forward<float>;
  ForwardResult out = run(in, margin, reduction, ignore_index, eps, store, need_x);
  return {out.loss, out.rows, out.inverse_norm, out.x_sum, out.class_sum, out.stored};
}

template <class T>
void backward(const LossArguments& in, const Tensor& grad_loss, const Tensor& rows_tensor,
              const Tensor& inverse_norm, const Tensor& x_sum, const Tensor& class_sum, const Tensor& stored,
              Tensor* dx, Tensor* dw, Tensor* dscale) {
  const HeadShape shape(in.x, in.weight, in.class_chunk);
  const int64_t N = shape.batch, D = shape.dim;
  const Rows<T> xs(in.x, D), ws(in.weight, D);
  const Labels labels(in.labels);
  const RowState rows = row_state(rows_tensor);
  const Weighting<T> weighting = weighting_of<T>(in.sample_weight, in.class_weight, in.smoothing);
  const T* inverse = static_cast<const T*>(inverse_norm.const_data_ptr());
  const std::vector<RowGradient> gradients =
      row_gradients<T>(rows, in.scale, in.smoothing / double(shape.classes), grad_loss);
  Buffer<T> x_hat(N * D);
  for_rows(N, D, [&](int64_t i) {  // zero where the row does not count, even if it holds NaN
    const T factor = T(rows[kInverseNorm][i]);
    if (rows[kRowWeight][i] != 0.0)
      xs.kernel.widen(xs.row(i), D, factor, x_hat.data + i * D);
    else
      std::fill_n(x_hat.data + i * D, D, T(0));
  });
  if (dscale != nullptr)
    *static_cast<double*>(dscale->mutable_data_ptr()) =
        std::accumulate(gradients.begin(), gradients.end(), 0.0,
                        [](double sum, const RowGradient& row) { return sum + row.scale; });
  if (dx != nullptr)
    grad_features(xs, ws, labels, inverse, gradients, rows, x_hat.data, data_or_null<T>(x_sum),
                  data_or_null<T>(class_sum), Rows<T>(*dx, D));
  if (dw != nullptr)
    grad_weight(shape, ws, labels, in.scale, inverse, gradients, rows, weighting, x_hat.data,
                data_or_null<T>(stored), *dw);
}

std::tuple<Tensor, Tensor, Tensor> normface_loss_backward(
    Tensor grad_loss, Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> scale, double scale_value,
    double /*eps: the norms are known by now*/, int64_t class_chunk, Tensor rows, Tensor inverse_norm,
    Tensor x_sum, Tensor class_sum, Tensor stored, bool need_x, bool need_weight, bool need_scale,
    int64_t /*score_kernel*/, ScalarType /*operand*/, std::optional<Tensor> class_weight, double smoothing) {
  const char* op = "normface_loss_backward";
  check_head(op, x, weight);
  check_labels(op, labels, x.size(0));
  check_shape(op, "rows", rows, kRowFields, x.size(0));
  check_weights(op, "class_weight", class_weight, x, weight.size(0));
  if (need_x) check_shape(op, "x_sum", x_sum, x.size(0), x.size(1));
  Tensor dx = need_x ? fresh_like(x) : fresh({0}, x.scalar_type());
  Tensor dw = need_weight ? fresh_like(weight) : fresh({0}, weight.scalar_type());
  Tensor ds = need_scale ? fresh({}, ScalarType::Double) : fresh({0}, ScalarType::Double);
  // The sample weights are in the rows' weights by now.
  const LossArguments in{x,           weight,       labels,       scale_of(scale, scale_value),
                         class_chunk, std::nullopt, class_weight, smoothing};
  const auto run = accumulator(x.scalar_type()) == ScalarType::Double ? backward<double> : backward<float>;
  run(in, grad_loss, rows, inverse_norm, x_sum, class_sum, stored, need_x ? &dx : nullptr,
      need_weight ? &dw : nullptr, need_scale ? &ds : nullptr);
  return {dx, dw, ds};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  m.impl("normface_loss", TORCH_BOX(&nf::cpu::normface_loss));
  m.impl("normface_loss_backward", TORCH_BOX(&nf::cpu::normface_loss_backward));
}
