// Cosines of listed pairs of a feature and an agent on the CPU: target_cosine, and the gradients of a
// weighted sum of listed cosines, where a dense sweep (head_backward.cpp) would mostly add zeros.
#include <algorithm>
#include <cstring>

#include "cpu/agents.h"
#include "cpu/head.h"
#include "cpu/row_cosine.h"
#include "engine/agent_arguments.h"

namespace nf::cpu {

Tensor target_cosine(const TargetCosineArguments& in) {
  check(in);
  const int64_t N = in.x.size(0), D = in.x.size(1), C = in.weight.size(0);
  const Labels given(in.labels);
  given.check(in.kName, C, in.ignore_index, in.is_shard);
  Tensor out = fresh({N}, ScalarType::Double);
  double* cosine = data_of<double>(out);
  dispatch_accumulator(in.x.scalar_type(), [&]<class T>() {
    const Rows<T> xs(in.x, D), ws(in.weight, D);
    const RowCosine<T> cosine_of(xs, ws, in.eps);
    for_rows(N, 4 * D, [&](int64_t i) {
      const int64_t label = given.data[i];
      const bool here = label != in.ignore_index && label != kElsewhere;
      cosine[i] = here ? cosine_of(i, label) : 0.0;
    });
  });
  return out;
}

namespace {

// g += factor unit(row r)
template <class T>
void add_unit_row(const Rows<T>& rows, int64_t r, T inverse, T eps, T factor, T* scratch, T* g) {
  unit_row_again(rows, r, inverse, eps, scratch);
  accum_rows<T>().axpy(factor, scratch, g, rows.length);
}

template <class T>
void pairs_backward(const CosinePairsBackwardArguments& in, Tensor* dx, Tensor* dw) {
  const double eps = in.eps;
  const int64_t N = in.x.size(0), D = in.x.size(1), C = in.weight.size(0), listed = in.classes.size(1);
  const Rows<T> xs(in.x, D), ws(in.weight, D);
  const T *factors = data_of<const T>(in.factors), *x_inv = data_of<const T>(in.x_inverse);
  const T* w_inv = data_of<const T>(in.weight_inverse);
  const int64_t* classes = data_of<const int64_t>(in.classes);
  // out[r] = the projection of `add`ed pairs
  const auto project = [&](const Rows<T>& rows, int64_t r, T inverse, const Rows<T>& out, const auto& add) {
    std::vector<T> memory(static_cast<size_t>(2 * D), T(0));
    T *g = memory.data(), *scratch = g + D;
    add(scratch, g);
    const auto scale = unit_row_again(rows, r, inverse, T(eps), scratch);
    out.kernel.project(scratch, g, D, T(1), scale, T(eps), out.row(r));
  };
  if (dx != nullptr) {
    const Rows<T> out(*dx, D);
    for_rows(N, listed * D, [&](int64_t i) {
      const int64_t* own = classes + i * listed;
      // Nothing listed, an ignored row above all: whatever it holds, NaN included, has no gradient.
      if (std::all_of(own, own + listed, [&](int64_t j) { return j >= C; })) {
        std::memset(out.row(i), 0, size_t(D * out.kernel.item));
        return;
      }
      project(xs, i, x_inv[i], out, [&](T* scratch, T* g) {
        for (int64_t k = i * listed; k < (i + 1) * listed; ++k)
          if (classes[k] < C) add_unit_row(ws, classes[k], w_inv[classes[k]], T(eps), factors[k], scratch, g);
      });
    });
  }
  if (dw == nullptr) return;
  const Rows<T> out(*dw, D);
  // The entries of the list by class, in their order: a counting sort.
  std::vector<int64_t> starts(static_cast<size_t>(C) + 1, 0);
  for (int64_t k = 0; k < N * listed; ++k)
    if (classes[k] < C) ++starts[size_t(classes[k]) + 1];
  for (size_t j = 1; j < starts.size(); ++j) starts[j] += starts[j - 1];
  std::vector<int64_t> order(static_cast<size_t>(starts.back())), place(starts.begin(), starts.end() - 1);
  for (int64_t k = 0; k < N * listed; ++k)
    if (classes[k] < C) order[size_t(place[size_t(classes[k])]++)] = k;
  for_rows(C, 4 * D, [&](int64_t j) {
    const auto begin = order.begin() + starts[size_t(j)], end = order.begin() + starts[size_t(j) + 1];
    if (begin == end) {
      std::memset(out.row(j), 0, size_t(D * out.kernel.item));
      return;
    }
    project(ws, j, w_inv[j], out, [&](T* scratch, T* g) {
      for (auto k = begin; k != end; ++k)
        add_unit_row(xs, *k / listed, x_inv[*k / listed], T(eps), factors[*k], scratch, g);
    });
  });
}

std::tuple<Tensor, Tensor> cosine_pairs_backward(const CosinePairsBackwardArguments& in) {
  check(in);
  Tensor dx = partial_gradient_like(in.x, in.need_x, in.is_shard),
         dw = gradient_like(in.weight, in.need_weight);
  dispatch_accumulator(in.x.scalar_type(), [&]<class T>() {
    pairs_backward<T>(in, in.need_x ? &dx : nullptr, in.need_weight ? &dw : nullptr);
  });
  return {dx, dw};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::cpu::target_cosine>(m);
  nf::implement<&nf::cpu::cosine_pairs_backward>(m);
}
