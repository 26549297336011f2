// pair_distance, d(a_i, b_i), and its backward on CUDA: one warp per pair.
#include "cuda/device/per_row.cuh"
#include "cuda/device/row_scale.cuh"
#include "cuda/host/outputs.h"
#include "engine/distance_arguments.h"
#include "engine/distance_checks.h"
#include "math/distance.h"

namespace nf {
namespace {

template <class T>
NF_KERNEL(kThreads)
pair_distance_kernel(StoredArray a, StoredArray b, int64_t rows, int64_t dim, int p, T* __restrict__ out) {
  const int64_t r = block_id() * kRowsPerBlock + warp_id();
  if (r >= rows) return;  // the whole warp leaves
  T sum = 0;
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    sum += math::distance_term<T>(p, a.load<T>(r * dim + d) - b.load<T>(r * dim + d)).value;
  sum = warp_sum(sum);
  if (lane_id() == 0) out[r] = sum;
}

template <class T>
NF_KERNEL(kThreads)
pair_gradient_kernel(const T* __restrict__ grad, StoredArray a, StoredArray b, int64_t rows, int64_t dim,
                     int p, StoredArray da, StoredArray db)  // each perhaps null
{
  const int64_t r = block_id() * kRowsPerBlock + warp_id();
  if (r >= rows) return;
  for (int64_t d = lane_id(); d < dim; d += kWarp) {
    const int64_t at = r * dim + d;
    const T slope = grad[r] * math::distance_term<T>(p, a.load<T>(at) - b.load<T>(at)).slope;
    if (da.data != nullptr) da.store<T>(at, slope);
    if (db.data != nullptr) db.store<T>(at, -slope);
  }
}

Tensor pair_distance(const PairDistanceArguments& in) {
  const Tensor &a = in.a, &b = in.b;
  check_pair(in.kName, a, b, in.p);
  Queue queue(a);
  const Tensor out = device_empty(a, {a.size(0)}, accumulator(a.scalar_type()));
  dispatch_accumulator(out.scalar_type(), [&]<class T>() {
    launch("pair_distance", queue, pair_distance_kernel<T>, warp_per_row(a.size(0)), kThreads, 0,
           StoredArray(a), StoredArray(b), a.size(0), a.size(1), int(in.p), data_of<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> pair_distance_backward(const PairDistanceBackwardArguments& in) {
  const Tensor &a = in.a, &b = in.b;
  check_pair_backward(in.kName, in.grad, a, b, in.p);
  Queue queue(a);
  Tensor da = gradient_like(a, in.need_a, false), db = gradient_like(b, in.need_b, false);
  dispatch_accumulator(a.scalar_type(), [&]<class T>() {
    launch("pair_gradient", queue, pair_gradient_kernel<T>, warp_per_row(a.size(0)), kThreads, 0,
           data_of<const T>(in.grad), StoredArray(a), StoredArray(b), a.size(0), a.size(1), int(in.p),
           in.need_a ? StoredArray(da) : StoredArray(), in.need_b ? StoredArray(db) : StoredArray());
  });
  return {da, db};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  nf::implement<&nf::pair_distance>(m);
  nf::implement<&nf::pair_distance_backward>(m);
}
