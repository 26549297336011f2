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
  const double* slope = rows[in.term == kExponentialHingeTerm ? kSum : kSecondSum];
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

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::cpu::hinge_threshold>(m);
  nf::implement<&nf::cpu::hinge_slopes>(m);
}
