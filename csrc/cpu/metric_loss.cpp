// The hinge losses over agents on the CPU: agent_hinge sweeps the classes once and reduces every row of
// cosines to a few sums and a short list of what is active; its backward follows the list
// (cosine_pairs_backward) or, where most classes are active, sweeps again (agent_hinge_backward). See
// csrc/math/hinge.h for the formulas.
#include <cstring>

#include "cpu/head.h"
#include "hinge_state.h"
#include "math/hinge.h"

namespace nf::cpu {
namespace {

// rows[field][i]
struct HingeRows {
  double* data;
  int64_t batch;

  explicit HingeRows(const Tensor& rows)
      : data(static_cast<double*>(const_cast<void*>(rows.const_data_ptr()))), batch(rows.size(1)) {}
  double* operator[](HingeField field) const { return data + field * batch; }
};

template <class T>
T* data_of(const Tensor& t) {
  return t.numel() > 0 ? static_cast<T*>(const_cast<void*>(t.const_data_ptr())) : nullptr;
}

// The cosine of two stored rows to the last digits: float rows multiply exactly in double.
template <class T>
double cosine_of(const Rows<T>& x, int64_t i, const Rows<T>& w, int64_t j, double eps) {
  const int64_t D = x.length;
  std::vector<T> rows(static_cast<size_t>(2 * D));
  T *a = rows.data(), *b = a + D;
  if constexpr (std::is_same_v<T, double>) {
    T inverse;
    unit_rows(x, i, 1, eps, a, &inverse);
    unit_rows(w, j, 1, eps, b, &inverse);
    return dot_in_double(a, b, D);
  } else {
    x.kernel.widen(x.row(i), D, T(1), a);
    w.kernel.widen(w.row(j), D, T(1), b);
    const double xx = dot_in_double(a, a, D), ww = dot_in_double(b, b, D), xw = dot_in_double(a, b, D);
    return xw / std::sqrt(xx + eps) / std::sqrt(ww + eps);
  }
}

// Unit features, distances to the label's agent, thresholds. An ignored row becomes zero, so that
// nothing it holds, NaN included, reaches a class.
template <class T>
void prepare(const Rows<T>& x, const Rows<T>& w, const int64_t* labels, double margin, bool triplet,
             int64_t ignore_index, double eps, T* x_hat, const HingeRows& rows, T* target) {
  for_rows(rows.batch, 4 * x.length, [&](int64_t i) {
    const bool ignored = labels[i] == ignore_index;
    T inverse = T(0);
    double distance = 0;
    if (ignored) {
      std::fill_n(x_hat + i * x.length, x.length, T(0));
    } else {
      unit_rows(x, i, 1, T(eps), x_hat + i * x.length, &inverse);
      distance = math::distance_of_cosine(cosine_of(x, i, w, labels[i], eps));
    }
    rows[kHingeInverseNorm][i] = inverse;
    rows[kHingeThreshold][i] = ignored ? 0.0 : margin + (triplet ? distance : 0.0);
    target[i] = T(distance);
  });
}

// Cosines of one tile, [N, width] = x_hat w_hat^T.
template <class T>
void score_tile(const HeadShape& shape, T* x_hat, T* w_hat, const Tile& tile, T* scores) {
  multiply<T>({x_hat, shape.batch, shape.dim, shape.dim},
              Matrix<T>{w_hat, tile.width, shape.dim, shape.dim}.transposed(),
              {scores, shape.batch, tile.width, tile.width});
}

// What one thread has gathered about one row.
template <class T>
struct RowFold {
  double sum = 0, value = 0, slope = 0, active = 0, cosine = 0;
  T best = -T(INFINITY);
  int64_t best_class = -1;
  std::vector<int64_t> classes;  // the first active ones
  std::vector<T> slopes;
};

struct Options {
  bool hardest;
  bool exponential;
  int64_t capacity;
};

// Cosines [begin, end) of a tile's row into the fold.
template <class T>
void fold(const T* row, int64_t begin, int64_t end, int64_t first, T threshold, const Options& options,
          RowFold<T>& into) {
  const auto part = accum_rows<T>().hinge_fold(row + begin, end - begin, threshold);
  into.sum += part.excess;
  into.active += part.active;
  into.cosine += part.cosine;
  if (options.hardest) {
    const T best = accum_rows<T>().largest_scaled(row + begin, end - begin, T(1));
    if (!(best > into.best)) return;
    into.best = best;
    for (int64_t j = begin; j < end; ++j)
      if (row[j] == best) {
        into.best_class = first + j;
        return;
      }
    return;
  }
  if (part.active == 0) return;
  const bool listing = int64_t(into.classes.size()) < options.capacity;
  if (!listing && !options.exponential) return;
  for (int64_t j = begin; j < end; ++j) {
    const auto h = math::hinge_term<T>(options.exponential, threshold, row[j]);
    if (h.slope == T(0)) continue;
    into.value += h.value;
    into.slope += h.slope;
    if (int64_t(into.classes.size()) >= options.capacity) continue;
    into.classes.push_back(first + j);
    into.slopes.push_back(h.slope);
  }
}

// The folds of all threads of one row, in the order of the classes, into its state and its list.
template <class T>
void finish_row(const HingeRows& rows, int64_t i, const Options& options, const RowFold<T>* folds,
                int64_t slots, int64_t no_class, T* value, int64_t* classes, T* slopes) {
  RowFold<T> all;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const RowFold<T>& part = folds[slot * rows.batch + i];
    all.sum += part.sum;
    all.value += part.value;
    all.slope += part.slope;
    all.active += part.active;
    all.cosine += part.cosine;
    if (part.best > all.best) {
      all.best = part.best;
      all.best_class = part.best_class;
    }
    for (size_t k = 0; k < part.classes.size() && int64_t(all.classes.size()) < options.capacity; ++k) {
      all.classes.push_back(part.classes[k]);
      all.slopes.push_back(part.slopes[k]);
    }
  }
  if (options.hardest) {
    const auto h = math::hinge_term<T>(options.exponential, T(rows[kHingeThreshold][i]), all.best);
    const bool exists = all.best_class >= 0 && h.slope != T(0);
    all.value = exists ? double(h.value) : 0.0;
    all.slope = exists ? double(h.slope) : 0.0;
    if (all.sum != all.sum) all.value = all.sum;  // NaN among the cosines shows
    if (exists && options.capacity > 0) {
      all.classes.push_back(all.best_class);
      all.slopes.push_back(h.slope);
    }
  } else if (!options.exponential) {
    all.value = all.sum;
    all.slope = all.active;
  }
  const bool ignored = rows[kHingeInverseNorm][i] == 0.0;
  rows[kHingeSum][i] = ignored ? 0.0 : all.sum;
  rows[kHingeValue][i] = ignored ? 0.0 : all.value;
  rows[kHingeSlope][i] = ignored ? 0.0 : all.slope;
  rows[kHingeActive][i] = ignored ? 0.0 : all.active;
  rows[kHingeCosine][i] = ignored ? 0.0 : all.cosine;
  rows[kHingeBest][i] = all.best;
  rows[kHingeBestClass][i] = double(all.best_class);
  value[i] = T(rows[kHingeValue][i]);
  for (int64_t k = 0; k < options.capacity; ++k) {
    const bool used = !ignored && k < int64_t(all.classes.size());
    classes[k] = used ? all.classes[size_t(k)] : no_class;
    if (slopes != nullptr) slopes[k] = used ? all.slopes[size_t(k)] : T(0);
  }
}

struct HingeResult {
  Tensor target, value, rows, inverse_norm, classes, slopes;
};

template <class T>
HingeResult forward(const Tensor& x, const Tensor& weight, const Tensor& labels_tensor, double margin,
                    bool triplet, const Options& options, int64_t ignore_index, double eps,
                    int64_t class_chunk) {
  const HeadShape shape(x, weight, class_chunk);
  const int64_t N = shape.batch, D = shape.dim, C = shape.classes, listed = 1 + options.capacity;
  const ScalarType wide = accumulator(x.scalar_type());
  const Rows<T> xs(x, D), ws(weight, D);
  const int64_t* labels = data_of<const int64_t>(labels_tensor);
  HingeResult out{fresh({N}, wide),
                  fresh({N}, wide),
                  fresh({kHingeFields, N}, ScalarType::Double),
                  fresh({C}, wide),
                  fresh({N, listed}, ScalarType::Long),
                  options.exponential ? fresh({N, listed}, wide) : fresh({0}, wide)};
  const HingeRows rows(out.rows);
  T *target = data_of<T>(out.target), *value = data_of<T>(out.value), *slopes = data_of<T>(out.slopes);
  T* inverse_norm = data_of<T>(out.inverse_norm);
  int64_t* classes = data_of<int64_t>(out.classes);
  Buffer<T> x_hat(N * D), w_hat(shape.slots * shape.chunk * D), scores(shape.slots * N * shape.chunk);
  prepare(xs, ws, labels, margin, triplet, ignore_index, eps, x_hat.data, rows, target);
  std::vector<RowFold<T>> folds(static_cast<size_t>(shape.slots * N));
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* unit = w_hat.data + slot * shape.chunk * D;
    T* tile_scores = scores.data + slot * N * shape.chunk;
    unit_rows(ws, tile.first, tile.width, T(eps), unit, inverse_norm + tile.first);
    score_tile(shape, x_hat.data, unit, tile, tile_scores);
    for (int64_t i = 0; i < N; ++i) {
      if (labels[i] == ignore_index) continue;
      const T* row = tile_scores + i * tile.width;
      const T threshold = T(rows[kHingeThreshold][i]);
      RowFold<T>& into = folds[size_t(slot * N + i)];
      const int64_t own = std::clamp<int64_t>(labels[i] - tile.first, -1, tile.width);
      if (own > 0) fold(row, 0, own, tile.first, threshold, options, into);
      if (own + 1 < tile.width) fold(row, own + 1, tile.width, tile.first, threshold, options, into);
    }
  });
  for (int64_t i = 0; i < N; ++i) {
    classes[i * listed] = labels[i] == ignore_index ? C : labels[i];
    if (slopes != nullptr) slopes[i * listed] = T(0);
    finish_row(rows, i, options, folds.data(), shape.slots, C, value, classes + i * listed + 1,
               slopes != nullptr ? slopes + i * listed + 1 : nullptr);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> agent_hinge(
    Tensor x, Tensor weight, Tensor labels, std::optional<Tensor> margin, double margin_value, bool triplet,
    bool hardest, bool exponential, int64_t ignore_index, double eps, int64_t class_chunk, int64_t capacity) {
  const char* op = "agent_hinge";
  check_head(op, x, weight);
  check_labels(op, labels, x.size(0));
  const int64_t* given = data_of<const int64_t>(labels);
  for (int64_t i = 0; i < x.size(0); ++i)
    if (given[i] != ignore_index && (given[i] < 0 || given[i] >= weight.size(0)))
      fail(op, ": expected `labels` in [0, ", weight.size(0), ") or ignore_index (", ignore_index, "), got ",
           given[i], " at row ", i);
  const auto run = accumulator(x.scalar_type()) == ScalarType::Double ? forward<double> : forward<float>;
  HingeResult out =
      run(x, weight, labels, scale_of(margin, margin_value), triplet,
          {hardest, exponential, std::max<int64_t>(0, capacity)}, ignore_index, eps, class_chunk);
  return {out.target, out.value, out.rows, out.inverse_norm, out.classes, out.slopes};
}

// Cosines -> d loss / d cosine, in place. The label's own has its factor.
template <class T>
void hinge_gradients(const HeadShape& shape, const int64_t* labels, const HingeRows& rows,
                     const T* target_factor, const T* hinge_factor, bool exponential, const Tile& tile,
                     T* scores) {
  for (int64_t i = 0; i < shape.batch; ++i) {
    T* row = scores + i * tile.width;
    if (rows[kHingeInverseNorm][i] == 0.0) {
      std::fill_n(row, tile.width, T(0));
      continue;
    }
    const T threshold = T(rows[kHingeThreshold][i]), factor = hinge_factor[i];
    for (int64_t j = 0; j < tile.width; ++j)
      row[j] = factor * math::hinge_term<T>(exponential, threshold, row[j]).slope;
    const int64_t own = labels[i] - tile.first;
    if (own >= 0 && own < tile.width) row[own] = target_factor[i];
  }
}

// Unit features from the saved norms; zero where a row is ignored, even if it holds NaN.
template <class T>
void unit_features(const Rows<T>& x, const HingeRows& rows, T* x_hat) {
  for_rows(rows.batch, x.length, [&](int64_t i) {
    const T inverse = T(rows[kHingeInverseNorm][i]);
    if (inverse == T(0))
      std::fill_n(x_hat + i * x.length, x.length, T(0));
    else
      x.kernel.widen(x.row(i), x.length, inverse, x_hat + i * x.length);
  });
}

template <class T>
void backward(const Tensor& target_factor, const Tensor& hinge_factor, const Tensor& x, const Tensor& weight,
              const Tensor& labels, const Tensor& rows_tensor, const Tensor& inverse_norm, bool exponential,
              int64_t class_chunk, Tensor* dx, Tensor* dw) {
  const HeadShape shape(x, weight, class_chunk);
  const int64_t N = shape.batch, D = shape.dim;
  const Rows<T> xs(x, D), ws(weight, D);
  const HingeRows rows(rows_tensor);
  const T* inverse = data_of<const T>(inverse_norm);
  Buffer<T> x_hat(N * D), w_hat(shape.slots * shape.chunk * D), scores(shape.slots * N * shape.chunk);
  Buffer<T> product(dw != nullptr ? shape.slots * shape.chunk * D : 0);
  Buffer<T> sums(dx != nullptr ? shape.slots * N * D : 0);
  std::fill_n(sums.data, sums.tensor.numel(), T(0));
  unit_features(xs, rows, x_hat.data);
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* unit = w_hat.data + slot * shape.chunk * D;
    T* g = scores.data + slot * N * shape.chunk;
    unit_rows_again(ws, tile.first, tile.width, inverse, unit);
    score_tile(shape, x_hat.data, unit, tile, g);
    hinge_gradients(shape, data_of<const int64_t>(labels), rows, data_of<const T>(target_factor),
                    data_of<const T>(hinge_factor), exponential, tile, g);
    if (dx != nullptr)
      multiply<T>({g, N, tile.width, tile.width}, {unit, tile.width, D, D},
                  {sums.data + slot * N * D, N, D, D}, true);
    if (dw == nullptr) return;
    const Rows<T> out(*dw, D);
    T* rows_of_tile = product.data + slot * shape.chunk * D;
    multiply<T>(Matrix<T>{g, N, tile.width, tile.width}.transposed(), {x_hat.data, N, D, D},
                {rows_of_tile, tile.width, D, D});
    for (int64_t j = 0; j < tile.width; ++j)
      ws.kernel.project(unit + j * D, rows_of_tile + j * D, D, inverse[tile.first + j], false,
                        out.row(tile.first + j));
  });
  if (dx == nullptr) return;
  add_slots(sums.data, shape.slots, N * D);
  const Rows<T> out(*dx, D);
  for_rows(N, D, [&](int64_t i) {
    xs.kernel.project(x_hat.data + i * D, sums.data + i * D, D, T(rows[kHingeInverseNorm][i]), false,
                      out.row(i));
  });
}

std::tuple<Tensor, Tensor> agent_hinge_backward(Tensor target_factor, Tensor hinge_factor, Tensor x,
                                                Tensor weight, Tensor labels, Tensor rows,
                                                Tensor inverse_norm, bool exponential,
                                                double /*eps: the norms are known by now*/,
                                                int64_t class_chunk, bool need_x, bool need_weight) {
  const char* op = "agent_hinge_backward";
  check_head(op, x, weight);
  check_labels(op, labels, x.size(0));
  check_shape(op, "rows", rows, kHingeFields, x.size(0));
  Tensor dx = need_x ? fresh_like(x) : fresh({0}, x.scalar_type());
  Tensor dw = need_weight ? fresh_like(weight) : fresh({0}, weight.scalar_type());
  const auto run = accumulator(x.scalar_type()) == ScalarType::Double ? backward<double> : backward<float>;
  run(target_factor, hinge_factor, x, weight, labels, rows, inverse_norm, exponential, class_chunk,
      need_x ? &dx : nullptr, need_weight ? &dw : nullptr);
  return {dx, dw};
}

// g += factor unit(row r)
template <class T>
void add_unit_row(const Rows<T>& rows, int64_t r, T inverse, T factor, T* scratch, T* g) {
  rows.kernel.widen(rows.row(r), rows.length, inverse, scratch);
  accum_rows<T>().axpy(factor, scratch, g, rows.length);
}

template <class T>
void pairs_backward(const Tensor& factors_tensor, const Tensor& classes_tensor, const Tensor& order_tensor,
                    const Tensor& x, const Tensor& weight, const Tensor& x_inverse,
                    const Tensor& weight_inverse, Tensor* dx, Tensor* dw) {
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0), listed = classes_tensor.size(1);
  const Rows<T> xs(x, D), ws(weight, D);
  const T *factors = data_of<const T>(factors_tensor), *x_inv = data_of<const T>(x_inverse);
  const T* w_inv = data_of<const T>(weight_inverse);
  const int64_t *classes = data_of<const int64_t>(classes_tensor),
                *order = data_of<const int64_t>(order_tensor);
  // out[r] = the projection of `add`ed pairs
  const auto project = [&](const Rows<T>& rows, int64_t r, T inverse, const Rows<T>& out, const auto& add) {
    std::vector<T> memory(static_cast<size_t>(2 * D), T(0));
    T *g = memory.data(), *scratch = g + D;
    add(scratch, g);
    rows.kernel.widen(rows.row(r), D, inverse, scratch);
    rows.kernel.project(scratch, g, D, inverse, false, out.row(r));
  };
  if (dx != nullptr) {
    const Rows<T> out(*dx, D);
    for_rows(N, listed * D, [&](int64_t i) {
      if (x_inv[i] == T(0)) {  // ignored: whatever it holds, NaN included, has no gradient
        std::memset(out.row(i), 0, size_t(D * out.kernel.item));
        return;
      }
      project(xs, i, x_inv[i], out, [&](T* scratch, T* g) {
        for (int64_t k = i * listed; k < (i + 1) * listed; ++k)
          if (classes[k] < C) add_unit_row(ws, classes[k], w_inv[classes[k]], factors[k], scratch, g);
      });
    });
  }
  if (dw == nullptr) return;
  const Rows<T> out(*dw, D);
  for_rows(C, D, [&](int64_t j) { std::memset(out.row(j), 0, size_t(D * out.kernel.item)); });
  std::vector<int64_t> starts;  // of the runs of one class in `order`
  int64_t used = 0;
  for (; used < N * listed && classes[order[used]] < C; ++used)
    if (used == 0 || classes[order[used]] != classes[order[used - 1]]) starts.push_back(used);
  starts.push_back(used);
  for_rows(int64_t(starts.size()) - 1, 4 * D, [&](int64_t run) {
    const int64_t j = classes[order[starts[size_t(run)]]];
    project(ws, j, w_inv[j], out, [&](T* scratch, T* g) {
      for (int64_t k = starts[size_t(run)]; k < starts[size_t(run) + 1]; ++k)
        add_unit_row(xs, order[k] / listed, x_inv[order[k] / listed], factors[order[k]], scratch, g);
    });
  });
}

std::tuple<Tensor, Tensor> cosine_pairs_backward(Tensor factors, Tensor classes, Tensor order, Tensor x,
                                                 Tensor weight, Tensor x_inverse, Tensor weight_inverse,
                                                 bool need_x, bool need_weight) {
  const char* op = "cosine_pairs_backward";
  check_head(op, x, weight);
  check_shape(op, "classes", classes, x.size(0), classes.size(1));
  check_shape(op, "factors", factors, x.size(0), classes.size(1));
  Tensor dx = need_x ? fresh_like(x) : fresh({0}, x.scalar_type());
  Tensor dw = need_weight ? fresh_like(weight) : fresh({0}, weight.scalar_type());
  const bool wide = accumulator(x.scalar_type()) == ScalarType::Double;
  (wide ? pairs_backward<double> : pairs_backward<float>)(factors, classes, order, x, weight, x_inverse,
                                                          weight_inverse, need_x ? &dx : nullptr,
                                                          need_weight ? &dw : nullptr);
  return {dx, dw};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  m.impl("agent_hinge", TORCH_BOX(&nf::cpu::agent_hinge));
  m.impl("agent_hinge_backward", TORCH_BOX(&nf::cpu::agent_hinge_backward));
  m.impl("cosine_pairs_backward", TORCH_BOX(&nf::cpu::cosine_pairs_backward));
}
