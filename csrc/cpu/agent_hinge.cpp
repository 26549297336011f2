// The hinge losses over agents on the CPU: agent_hinge sweeps the classes once and reduces every row of
// cosines to a few sums and a short list of what is active; its backward follows the list
// (cosine_pairs.cpp) or, where most classes are active, sweeps again (agent_hinge_backward). See
// csrc/math/terms/hinge.h for the formulas.
#include <cstring>

#include "cpu/head.h"
#include "cpu/hinge_fold.h"
#include "engine/hinge_checks.h"

namespace nf::cpu {
namespace {

// Unit features, distances to the label's agent, thresholds. An ignored row becomes zero, so that
// nothing it holds, NaN included, reaches a class.
template <class T>
void prepare(const Rows<T>& x, const int64_t* labels, const double* target_cosine, double margin,
             bool triplet, int64_t ignore_index, double eps, T* x_hat, const HingeRows& rows, T* target) {
  for_rows(rows.batch, x.length, [&](int64_t i) {
    const bool ignored = labels[i] == ignore_index;
    double inverse = 0;  // where it has room
    if (ignored) {
      std::fill_n(x_hat + i * x.length, x.length, T(0));
    } else {
      const auto scale = x.kernel.normalize_wide(x.row(i), x.length, 2, T(eps), x_hat + i * x.length);
      inverse = scale.wide_inverse();
    }
    const double distance = ignored ? 0.0 : math::distance_of_cosine(target_cosine[i]);
    rows[kHingeCounts][i] = ignored ? 0.0 : 1.0;
    rows[kHingeInverseNorm][i] = inverse;
    rows[kHingeThreshold][i] = ignored ? 0.0 : margin + (triplet ? distance : 0.0);
    target[i] = T(distance);
  });
}

struct HingeResult {
  Tensor target, value, rows, inverse_norm, classes, slopes;
};

template <class T>
HingeResult forward(const AgentHingeArguments& in) {
  const FoldOptions options{in.hardest, in.exponential, std::max<int64_t>(0, in.capacity)};
  const int64_t ignore_index = in.ignore_index;
  const HeadShape shape(in.x, in.weight, in.class_chunk);
  const int64_t N = shape.batch, D = shape.dim, C = shape.classes, listed = 1 + options.capacity;
  const ScalarType wide = accumulator(in.x.scalar_type());
  const Rows<T> xs(in.x, D), ws(in.weight, D);
  const int64_t* labels = data_of<const int64_t>(in.labels);
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
  prepare(xs, labels, data_of<const double>(in.target_cosine), number_argument(in.margin, in.margin_value),
          in.triplet, ignore_index, in.eps, x_hat.data, rows, target);
  std::vector<RowFold<T>> folds(static_cast<size_t>(shape.slots * N));
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* unit = w_hat.data + slot * shape.chunk * D;
    T* tile_scores = scores.data + slot * N * shape.chunk;
    unit_rows(ws, tile.first, tile.width, T(in.eps), unit, inverse_norm + tile.first);
    score_tile(shape, x_hat.data, unit, tile, tile_scores);
    for (int64_t i = 0; i < N; ++i) {
      if (labels[i] == ignore_index) continue;
      const T* row = tile_scores + i * tile.width;
      const T threshold = T(rows[kHingeThreshold][i]);
      RowFold<T>& into = folds[size_t(slot * N + i)];
      around_target(labels[i], tile, [&](int64_t begin, int64_t end) {
        fold(row, begin, end, tile.first, threshold, options, into);
      });
    }
  });
  for (int64_t i = 0; i < N; ++i) {
    const bool here = labels[i] != ignore_index && labels[i] >= 0 && labels[i] < C;
    classes[i * listed] = here ? labels[i] : C;
    if (slopes != nullptr) slopes[i * listed] = T(0);
    finish_row(rows, i, options, folds.data(), shape.slots, C, value, classes + i * listed + 1,
               slopes != nullptr ? slopes + i * listed + 1 : nullptr);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> agent_hinge(const AgentHingeArguments& in) {
  check(in);
  HingeResult out = dispatch_accumulator(in.x.scalar_type(), [&]<class T>() { return forward<T>(in); });
  return {out.target, out.value, out.rows, out.inverse_norm, out.classes, out.slopes};
}

// Cosines -> d loss / d cosine, in place. The label's own has its factor.
template <class T>
void hinge_gradients(const HeadShape& shape, const int64_t* labels, const HingeRows& rows,
                     const T* target_factor, const T* hinge_factor, bool exponential, const Tile& tile,
                     T* scores) {
  for (int64_t i = 0; i < shape.batch; ++i) {
    T* row = scores + i * tile.width;
    if (rows[kHingeCounts][i] == 0.0) {
      std::fill_n(row, tile.width, T(0));
      continue;
    }
    const T threshold = T(rows[kHingeThreshold][i]), factor = hinge_factor[i];
    for (int64_t j = 0; j < tile.width; ++j)
      row[j] = factor * math::hinge_term<T>(exponential, threshold, row[j]).slope;
    const int64_t own = target_place(labels[i], tile.first, tile.width);
    if (own >= 0) row[own] = target_factor[i];
  }
}

// Unit features from the saved norms; zero where a row is ignored, even if it holds NaN.
template <class T>
void unit_features(const Rows<T>& x, const HingeRows& rows, T eps, T* x_hat) {
  for_rows(rows.batch, x.length, [&](int64_t i) {
    if (rows[kHingeCounts][i] == 0.0)
      std::fill_n(x_hat + i * x.length, x.length, T(0));
    else
      unit_row_again(x, i, T(rows[kHingeInverseNorm][i]), eps, x_hat + i * x.length);
  });
}

template <class T>
void backward(const AgentHingeBackwardArguments& in, Tensor* dx, Tensor* dw) {
  const double eps = in.eps;
  const HeadShape shape(in.x, in.weight, in.class_chunk);
  const int64_t N = shape.batch, D = shape.dim;
  const Rows<T> xs(in.x, D), ws(in.weight, D);
  const HingeRows rows(in.rows);
  const T* inverse = data_of<const T>(in.inverse_norm);
  Buffer<T> x_hat(N * D), w_hat(shape.slots * shape.chunk * D), scores(shape.slots * N * shape.chunk);
  Buffer<T> product(dw != nullptr ? shape.slots * shape.chunk * D : 0);
  Buffer<T> sums(dx != nullptr ? shape.slots * N * D : 0);
  std::fill_n(sums.data, sums.tensor.numel(), T(0));
  unit_features(xs, rows, T(eps), x_hat.data);
  shape.for_tiles([&](int64_t slot, const Tile& tile) {
    T* unit = w_hat.data + slot * shape.chunk * D;
    T* g = scores.data + slot * N * shape.chunk;
    for (int64_t j = 0; j < tile.width; ++j)
      unit_row_again(ws, tile.first + j, inverse[tile.first + j], T(eps), unit + j * D);
    score_tile(shape, x_hat.data, unit, tile, g);
    hinge_gradients(shape, data_of<const int64_t>(in.labels), rows, data_of<const T>(in.target_factor),
                    data_of<const T>(in.hinge_factor), in.exponential, tile, g);
    if (dx != nullptr)
      multiply<T>({g, N, tile.width, tile.width}, {unit, tile.width, D, D},
                  {sums.data + slot * N * D, N, D, D}, true);
    if (dw == nullptr) return;
    const Rows<T> out(*dw, D);
    T* rows_of_tile = product.data + slot * shape.chunk * D;
    multiply<T>(Matrix<T>{g, N, tile.width, tile.width}.transposed(), {x_hat.data, N, D, D},
                {rows_of_tile, tile.width, D, D});
    for (int64_t j = 0; j < tile.width; ++j)
      ws.kernel.project(unit + j * D, rows_of_tile + j * D, D, T(1),
                        scale_again(ws, tile.first + j, inverse[tile.first + j], T(eps), unit + j * D),
                        T(eps), out.row(tile.first + j));
  });
  if (dx == nullptr) return;
  add_slots(sums.data, shape.slots, N * D);
  const Rows<T> out(*dx, D);
  for_rows(N, D, [&](int64_t i) {
    if (rows[kHingeCounts][i] == 0.0) {  // ignored: no gradient, whatever the agents hold
      std::memset(out.row(i), 0, size_t(D * out.kernel.item));
      return;
    }
    out.kernel.project(x_hat.data + i * D, sums.data + i * D, D, T(1),
                       scale_again(xs, i, T(rows[kHingeInverseNorm][i]), T(eps), x_hat.data + i * D), T(eps),
                       out.row(i));
  });
}

std::tuple<Tensor, Tensor> agent_hinge_backward(const AgentHingeBackwardArguments& in) {
  check(in);
  Tensor dx = partial_gradient_like(in.x, in.need_x, in.is_shard),
         dw = gradient_like(in.weight, in.need_weight);
  dispatch_accumulator(in.x.scalar_type(), [&]<class T>() {
    backward<T>(in, in.need_x ? &dx : nullptr, in.need_weight ? &dw : nullptr);
  });
  return {dx, dw};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::cpu::agent_hinge>(m);
  nf::implement<&nf::cpu::agent_hinge_backward>(m);
}
