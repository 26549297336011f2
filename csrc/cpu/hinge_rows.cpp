// The rows of the losses over agents on the CPU, before the sweep and after it.
#include "cpu/agents.h"
#include "cpu/head.h"
#include "cpu/row_terms.h"
#include "math/terms/hinge.h"

namespace nf::cpu {
namespace {

std::tuple<Tensor, Tensor> hinge_threshold(const HingeThresholdArguments& in) {
  check(in);
  const int64_t N = in.x.size(0);
  const Tensor found = in.cosine ? *in.cosine : target_cosine(in);
  const double margin = number_argument(in.margin, in.margin_value);
  const double* cosine = data_of<const double>(found);
  const int64_t* labels = data_of<const int64_t>(in.labels);
  Tensor distances = fresh({N}, accumulator(in.x.scalar_type())), thresholds = fresh({N}, ScalarType::Double);
  double* threshold = data_of<double>(thresholds);
  dispatch_accumulator(in.x.scalar_type(), [&]<class T>() {
    T* distance = data_of<T>(distances);
    for (int64_t i = 0; i < N; ++i) {
      const double d = math::distance_of_cosine(cosine[i]);
      distance[i] = labels[i] == in.ignore_index ? T(0) : T(d);
      threshold[i] = math::hinge_threshold(margin, in.triplet, d);
    }
  });
  return {distances, thresholds};
}

Tensor hinge_slopes(const HingeSlopesArguments& in) {
  check(in);
  const RowState rows(in.rows);
  const int64_t N = rows.batch;
  const double* slope = rows[slope_field(in.kName, in.term)];
  Tensor out = fresh({kSlopeFields, N}, ScalarType::Double);
  const RowSlopes slopes(out);
  std::fill_n(slopes.data, kSlopeFields * N, 0.0);
  dispatch_accumulator(in.grad_distance.scalar_type(), [&]<class T>() {
    const T *grad_distance = data_of<const T>(in.grad_distance),
            *grad_hinges = data_of<const T>(in.grad_hinges);
    for (int64_t i = 0; i < N; ++i) {
      if (rows[kRowWeight][i] == 0) continue;
      const auto own = math::hinge_slopes(grad_distance[i], grad_hinges[i], slope[i], in.triplet);
      slopes[kOthersSlope][i] = own.others;
      slopes[kTargetSlope][i] = own.target;
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> hinge_pairs(const HingePairsArguments& in) {
  check(in);
  const RowState rows(in.rows);
  const RowSlopes slopes(in.slopes);
  const int64_t N = rows.batch, width = in.width, capacity = in.listed.size(1);
  const double* slope = rows[slope_field(in.kName, in.term)];
  const ScalarType wide = in.found.scalar_type();
  Tensor factors = fresh({N, 1 + width}, wide), classes = fresh({N, 1 + width}, ScalarType::Long),
         inverse = fresh({N}, wide);
  const int64_t *labels = data_of<const int64_t>(in.labels), *listed = data_of<const int64_t>(in.listed);
  int64_t* out = data_of<int64_t>(classes);
  dispatch_accumulator(wide, [&]<class T>() {
    const T* found = data_of<const T>(in.found);
    T *factor = data_of<T>(factors), *x_inverse = data_of<T>(inverse);
    for (int64_t i = 0; i < N; ++i) {
      x_inverse[i] = T(rows[kInverseNorm][i]);
      const double target = slopes[kTargetSlope][i], others = slopes[kOthersSlope][i];
      *factor++ = T(target);
      *out++ = target != 0 && labels[i] != kElsewhere ? labels[i] : in.count;
      for (int64_t k = i * capacity; k < i * capacity + width; ++k) {
        *factor++ = T(others * (in.hardest ? slope[i] : double(found[k])));
        *out++ = others != 0 ? listed[k] : in.count;
      }
    }
  });
  return {factors, classes, inverse};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::cpu::hinge_threshold>(m);
  nf::implement<&nf::cpu::hinge_slopes>(m);
  nf::implement<&nf::cpu::hinge_pairs>(m);
}
