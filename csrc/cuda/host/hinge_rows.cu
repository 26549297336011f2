// The rows of the losses over agents on CUDA, before the sweep and after it.
#include "cuda/host/agents.h"
#include "cuda/host/head.cuh"
#include "math/terms/hinge.h"

namespace nf {
namespace {

// One thread per row.
template <class T>
NF_KERNEL(kThreads)
hinge_threshold_kernel(const double* __restrict__ cosine,   // [N]
                       const int64_t* __restrict__ labels,  // [N]
                       RowNumbers margin, bool triplet, int64_t batch, int64_t ignore_index,
                       T* __restrict__ distance,        // [N]
                       double* __restrict__ threshold)  // [N]
{
  const int64_t i = block_id() * kThreads + thread_id();
  if (i >= batch) return;
  const double d = math::distance_of_cosine(cosine[i]);
  distance[i] = labels[i] == ignore_index ? T(0) : T(d);
  threshold[i] = math::hinge_threshold(margin.at(i), triplet, d);
}

// One thread per row.
template <class T>
NF_KERNEL(kThreads)
hinge_slopes_kernel(RowState rows, RowField slope, const T* __restrict__ grad_distance,  // [N]
                    const T* __restrict__ grad_hinges,                                   // [N]
                    bool triplet, RowSlopes slopes) {
  const int64_t i = block_id() * kThreads + thread_id();
  if (i >= rows.batch) return;
  math::HingeSlopes own{0.0, 0.0};
  if (rows.at(kRowWeight, i) != 0.0)
    own = math::hinge_slopes(grad_distance[i], grad_hinges[i], rows.at(slope, i), triplet);
  slopes.at(kOthersSlope, i) = own.others;
  slopes.at(kTargetSlope, i) = own.target;
  slopes.at(kUniformSlope, i) = 0.0;
  slopes.at(kScaleSlope, i) = 0.0;
}

struct HingeList {
  const int64_t *labels, *listed;  // [N], [N, capacity]
  int64_t capacity, width, count;
  bool hardest;
  RowField slope;
};

// One thread per entry of the result.
template <class T>
NF_KERNEL(kThreads)
hinge_pairs_kernel(RowState rows, RowSlopes slopes, HingeList list,
                   const T* __restrict__ found,    // [N, capacity]
                   T* __restrict__ factors,        // [N, 1 + width]
                   int64_t* __restrict__ classes,  // [N, 1 + width]
                   T* __restrict__ x_inverse)      // [N]
{
  const int64_t at = block_id() * kThreads + thread_id(), wide = 1 + list.width;
  if (at >= rows.batch * wide) return;
  const int64_t i = at / wide, column = at % wide;
  if (column == 0) {
    const double target = slopes.at(kTargetSlope, i);
    x_inverse[i] = T(rows.at(kInverseNorm, i));
    factors[at] = T(target);
    classes[at] = target != 0 && list.labels[i] != kElsewhere ? list.labels[i] : list.count;
    return;
  }
  const int64_t k = i * list.capacity + column - 1;
  const double others = slopes.at(kOthersSlope, i);
  factors[at] = T(others * (list.hardest ? rows.at(list.slope, i) : double(found[k])));
  classes[at] = others != 0 ? list.listed[k] : list.count;
}

std::tuple<Tensor, Tensor> hinge_threshold(const HingeThresholdArguments& in) {
  check(in);
  const int64_t N = in.x.size(0);
  Queue queue(in.x);
  const Tensor cosine = in.cosine ? *in.cosine : target_cosine(in);
  const Tensor distance = device_empty(in.x, {N}, accumulator(in.x.scalar_type())),
               threshold = device_empty(in.x, {N}, ScalarType::Double);
  dispatch_accumulator(in.x.scalar_type(), [&]<class T>() {
    launch("hinge_threshold", queue, hinge_threshold_kernel<T>, thread_per(N), kThreads, 0,
           data_of<const double>(cosine), data_of<const int64_t>(in.labels),
           RowNumbers{in.margin, in.margin_value}, in.triplet, N, in.ignore_index, data_of<T>(distance),
           data_of<double>(threshold));
  });
  return {distance, threshold};
}

Tensor hinge_slopes(const HingeSlopesArguments& in) {
  check(in);
  Queue queue(in.rows);
  const RowState rows(in.rows);
  const Tensor slopes = device_empty(in.rows, {kSlopeFields, rows.batch}, ScalarType::Double);
  dispatch_accumulator(in.grad_distance.scalar_type(), [&]<class T>() {
    launch("hinge_slopes", queue, hinge_slopes_kernel<T>, thread_per(rows.batch), kThreads, 0, rows,
           slope_field(in.kName, in.term), data_of<const T>(in.grad_distance),
           data_of<const T>(in.grad_hinges), in.triplet, RowSlopes(slopes));
  });
  return slopes;
}

std::tuple<Tensor, Tensor, Tensor> hinge_pairs(const HingePairsArguments& in) {
  check(in);
  Queue queue(in.rows);
  const RowState rows(in.rows);
  const int64_t N = rows.batch, wide = 1 + in.width;
  const ScalarType type = in.found.scalar_type();
  const Tensor factors = device_empty(in.rows, {N, wide}, type),
               classes = device_empty(in.rows, {N, wide}, ScalarType::Long),
               x_inverse = device_empty(in.rows, {N}, type);
  const HingeList list{data_of<const int64_t>(in.labels),
                       data_or_null<const int64_t>(in.listed),
                       in.listed.size(1),
                       in.width,
                       in.count,
                       in.hardest,
                       slope_field(in.kName, in.term)};
  dispatch_accumulator(type, [&]<class T>() {
    launch("hinge_pairs", queue, hinge_pairs_kernel<T>, thread_per(N * wide), kThreads, 0, rows,
           RowSlopes(in.slopes), list, data_or_null<const T>(in.found), data_of<T>(factors),
           data_of<int64_t>(classes), data_of<T>(x_inverse));
  });
  return {factors, classes, x_inverse};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  nf::implement<&nf::hinge_threshold>(m);
  nf::implement<&nf::hinge_slopes>(m);
  nf::implement<&nf::hinge_pairs>(m);
}
