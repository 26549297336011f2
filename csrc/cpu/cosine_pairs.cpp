// Cosines of listed pairs of a feature and an agent on the CPU: target_cosine, and the gradients of a
// weighted sum of listed cosines, where a dense sweep (head_backward.cpp) would mostly add zeros.
#include <algorithm>
#include <cstring>

#include "cpu/agents.h"
#include "cpu/head.h"
#include "cpu/row_cosine.h"
#include "engine/agent_arguments.h"
#include "math/centers.h"

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

Tensor target_center(const TargetCenterArguments& in) {
  check(in);
  const int64_t N = in.x.size(0), D = in.x.size(1), classes = in.weight.size(0) / in.centers;
  const Labels given(in.labels);
  given.check(in.kName, classes, in.ignore_index, in.is_shard);
  Tensor out = fresh({N}, ScalarType::Long);
  int64_t* place = data_of<int64_t>(out);
  dispatch_accumulator(in.x.scalar_type(), [&]<class T>() {
    const Rows<T> xs(in.x, D), ws(in.weight, D);
    const RowCosine<T> cosine_of(xs, ws, in.eps);
    for_rows(N, 4 * D * in.centers, [&](int64_t i) {
      const int64_t label = given.data[i];
      const auto nearest = [&] {
        const int64_t first = label * in.centers;
        return first +
               math::winner<double>(in.centers, [&](int64_t k) { return cosine_of(i, first + k); }).center;
      };
      place[i] = label == in.ignore_index             ? kIgnored
                 : in.is_shard && label == kElsewhere ? kElsewhere
                                                      : nearest();
    });
  });
  return out;
}

// Sums of unit rows times their factors. What 1 / ||.|| a row has is a factor, too, unless the row is far from
// every usual length: a product of the two could leave the range of T.
template <class T>
class UnitRowSum {
 public:
  UnitRowSum(const Rows<T>& rows, const T* inverse, T eps)
      : rows_(rows), inverse_(inverse), eps_(eps), unit_(size_t(rows.length)), sum_(size_t(rows.length)) {}

  void add(int64_t r, T factor) {
    if (math::norm_is_moderate(inverse_[r])) {
      places_.push_back(r);
      factors_.push_back(factor * inverse_[r]);
      return;
    }
    unit_row_again(rows_, r, inverse_[r], eps_, unit_.data());
    accum_rows<T>().axpy(factor, unit_.data(), sum_.data(), rows_.length);
  }

  // The sum, after which it begins anew.
  const T* take(T* into) {
    rows_.kernel.add_rows(rows_.data, places_.data(), factors_.data(), int64_t(places_.size()), rows_.length,
                          sum_.data());
    std::copy(sum_.begin(), sum_.end(), into);
    std::fill(sum_.begin(), sum_.end(), T(0));
    places_.clear(), factors_.clear();
    return into;
  }

 private:
  const Rows<T>& rows_;
  const T* inverse_;
  T eps_;
  std::vector<T> unit_, sum_;
  std::vector<int64_t> places_;
  std::vector<T> factors_;
};

// The entries of a list by class, in their order: a counting sort.
class ByClass {
 public:
  ByClass(const int64_t* classes, int64_t count, int64_t limit) : ends_(size_t(limit) + 2, 0) {
    for (int64_t k = 0; k < count; ++k)
      if (is_class(classes[k], limit)) ++ends_[size_t(classes[k]) + 2];
    for (size_t j = 2; j < ends_.size(); ++j) ends_[j] += ends_[j - 1];
    entries_.resize(size_t(ends_.back()));
    for (int64_t k = 0; k < count; ++k)
      if (is_class(classes[k], limit)) entries_[size_t(ends_[size_t(classes[k]) + 1]++)] = k;
  }
  const int64_t* begin(int64_t j) const { return entries_.data() + ends_[size_t(j)]; }
  const int64_t* end(int64_t j) const { return begin(j + 1); }

 private:
  std::vector<int64_t> ends_;  // while sorting, of class j at j + 1: where its next entry goes; then its end
  std::vector<int64_t> entries_;
};

template <class T>
struct PairsBackward {
  const Rows<T>&x, &weight;
  const T *x_inverse, *weight_inverse, *factors;
  const int64_t* classes;  // [N, listed]
  int64_t batch, listed, all;
  T eps;

  void features(const Rows<T>& out) const {
    for_row_runs(batch, listed * x.length, [&](int64_t first, int64_t last) {
      UnitRowSum<T> sum(weight, weight_inverse, eps);
      Projection onto(*this, x, x_inverse, out);
      for (int64_t i = first; i < last; ++i) {
        bool any = false;
        for (int64_t k = i * listed; k < (i + 1) * listed; ++k) {
          if (!is_class(classes[k], all)) continue;
          sum.add(classes[k], factors[k]);
          any = true;
        }
        onto.put(i, any, sum);
      }
    });
  }

  void agents(const Rows<T>& out) const {
    const ByClass order(classes, batch * listed, all);
    for_row_runs(all, 4 * x.length, [&](int64_t first, int64_t last) {
      UnitRowSum<T> sum(x, x_inverse, eps);
      Projection onto(*this, weight, weight_inverse, out);
      for (int64_t j = first; j < last; ++j) {
        for (const int64_t* k = order.begin(j); k != order.end(j); ++k) sum.add(*k / listed, factors[*k]);
        onto.put(j, order.begin(j) != order.end(j), sum);
      }
    });
  }

 private:
  // Of gradients of unit rows onto those of the rows. A row of which nothing is listed, an ignored one above
  // all, has none, whatever it holds, NaN included.
  struct Projection {
    const PairsBackward& of;
    const Rows<T>& rows;
    const T* inverse;
    const Rows<T>& out;
    std::vector<T> unit, gradient;

    Projection(const PairsBackward& pairs, const Rows<T>& own, const T* inverses, const Rows<T>& into)
        : of(pairs),
          rows(own),
          inverse(inverses),
          out(into),
          unit(size_t(own.length)),
          gradient(size_t(own.length)) {}

    void put(int64_t r, bool any, UnitRowSum<T>& sum) {
      if (!any) {
        std::memset(out.row(r), 0, size_t(out.length * out.kernel.item));
        return;
      }
      const auto scale = unit_row_again(rows, r, inverse[r], of.eps, unit.data());
      out.kernel.project(unit.data(), sum.take(gradient.data()), out.length, T(1), scale, of.eps, out.row(r));
    }
  };
};

std::tuple<Tensor, Tensor> cosine_pairs_backward(const CosinePairsBackwardArguments& in) {
  check(in);
  Tensor dx = partial_gradient_like(in.x, in.need_x, in.is_shard),
         dw = gradient_like(in.weight, in.need_weight);
  const int64_t N = in.x.size(0), D = in.x.size(1), C = in.weight.size(0);
  dispatch_accumulator(in.x.scalar_type(), [&]<class T>() {
    const Rows<T> x(in.x, D), weight(in.weight, D);
    const PairsBackward<T> pairs{x,
                                 weight,
                                 data_of<const T>(in.x_inverse),
                                 data_of<const T>(in.weight_inverse),
                                 data_of<const T>(in.factors),
                                 data_of<const int64_t>(in.classes),
                                 N,
                                 in.classes.size(1),
                                 C,
                                 T(in.eps)};
    if (in.need_x) pairs.features(Rows<T>(dx, D));
    if (in.need_weight) pairs.agents(Rows<T>(dw, D));
  });
  return {dx, dw};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::cpu::target_cosine>(m);
  nf::implement<&nf::cpu::target_center>(m);
  nf::implement<&nf::cpu::cosine_pairs_backward>(m);
}
