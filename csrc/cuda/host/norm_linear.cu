// norm_linear, s * cos(x_i, w_j), on CUDA: unit rows by our kernels, products by cuBLAS. The unit rows
// have the dtype of the result, the sums in the products and in dW are float32.
//
// The scale goes where it cannot leave the range of a 16-bit type while the result is inside it: backward
// multiplies sums, forward a unit row before its one rounding. Where those are float16, s would overflow or
// sink below its normal range, so each side takes the root of it; and where the features are not normalised,
// their size is nobody's to know, and the float32 product is scaled on its way to the result.
#include <optional>

#include "cuda/device/per_row.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/stored.cuh"
#include "cuda/host/rows.h"
#include "cuda/products/cublas.h"
#include "engine/cosine_arguments.h"

namespace nf {
namespace {

constexpr int64_t kCellsAtOnce = int64_t(1) << 23;  // wide scratch of a float16 result: it stays in the cache
const Scale kOne(std::nullopt, 1.0);

// factor x_i / ||x_i||, stored as `type`.
Tensor unit_rows_of(Queue& queue, const Tensor& x, double eps, ScalarType type, const Tensor* inverse,
                    const Scale& factor = kOne, FactorPart part = FactorPart::kWhole) {
  Tensor y = device_empty(x, x.sizes(), type);
  UnitRows task{x.const_data_ptr(), x.scalar_type(), x.size(0), x.size(1), 2, eps};
  task.y = y.mutable_data_ptr();
  task.y_type = type;
  task.inverse = inverse != nullptr ? inverse->mutable_data_ptr() : nullptr;
  task.factor = factor;
  task.part = part;
  unit_rows(queue, task);
  return y;
}

Matrix whole(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type(), t.size(0), t.size(1), t.size(1)};
}

// to[i] = s from[i]
template <class T>
NF_KERNEL(kThreads)
scale_kernel(StoredArray from, StoredArray to, int64_t count, Scale scale) {
  const T s = T(scale.value());
  for (int64_t i = block_id() * kThreads + thread_id(); i < count; i += block_count() * kThreads)
    to.store<T>(i, s * from.load<T>(i));
}

// What a block of dot_kernel adds up, as long as there are no more than kDotBlocks of them: fixed numbers, so that
// every device adds in the same order.
constexpr int64_t kDotRun = int64_t(1) << 14, kDotBlocks = 1024;

// sums[b] = the b-th block's part of sum of a[i] b[i].
template <class T>
NF_KERNEL(kThreads)
dot_kernel(StoredArray a, const T* __restrict__ b, int64_t count, double* __restrict__ sums) {
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  double sum = 0;
  a.visit<T>([&](const auto* left) {
    const int64_t step = block_count() * kThreads;
#pragma unroll 4
    for (int64_t i = block_id() * kThreads + thread_id(); i < count; i += step)
      sum += double(T(left[i])) * double(b[i]);
  });
  sum = block_sum(sum, scratch);
  if (thread_id() == 0) sums[block_id()] = sum;
}

// total = the sum of the blocks' parts, by one block.
NF_KERNEL(kThreads)
add_dots_kernel(const double* __restrict__ sums, int64_t count, double* __restrict__ total) {
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  double sum = 0;
#pragma unroll 4
  for (int64_t i = thread_id(); i < count; i += kThreads) sum += sums[i];
  sum = block_sum(sum, scratch);
  if (thread_id() == 0) *total = sum;
}

// total = sum of a[i] b[i], b in the accumulator type.
void dot(Queue& queue, const Tensor& a, const Tensor& b, double* total) {
  const int64_t count = a.numel();
  const int64_t blocks = std::clamp<int64_t>((count + kDotRun - 1) / kDotRun, 1, kDotBlocks);
  const size_t shared = shared_bytes<double>(kThreads / kWarp);
  const Tensor parts = device_empty(a, {blocks > 1 ? blocks : 0}, ScalarType::Double);
  double* sums = blocks > 1 ? data_of<double>(parts) : total;
  dispatch_accumulator(b.scalar_type(), [&]<class T>() {
    launch("dot", queue, dot_kernel<T>, Grid{blocks}, kThreads, shared, StoredArray(a), data_of<const T>(b),
           count, sums);
  });
  if (blocks > 1) launch("add_dots", queue, add_dots_kernel, Grid{1}, kThreads, shared, sums, blocks, total);
}

// to[i, first + j] = s from[i, j], j < width. Blocks: rows x splits of a row.
NF_KERNEL(kThreads)
scale_columns_kernel(const float* __restrict__ from, int64_t width, StoredArray to, int64_t columns,
                     int64_t first, Scale scale) {
  const float s = float(scale.value());
  const int64_t i = block_id();
  for (int64_t j = block_y() * kThreads + thread_id(); j < width; j += block_count_y() * kThreads)
    to.store<float>(i * columns + first + j, s * from[i * width + j]);
}

// out = s (x w_hat^T), the product in float32, some classes at a time.
void scale_products(Queue& queue, const Tensor& x, const Tensor& w_hat, const Scale& scale,
                    const Tensor& out) {
  const int64_t N = x.size(0), D = x.size(1), C = w_hat.size(0);
  const int64_t chunk = std::clamp<int64_t>(kCellsAtOnce / std::max<int64_t>(1, N), 1, C);
  const Tensor product = device_empty(x, {N, chunk}, ScalarType::Float);
  for (int64_t first = 0; first < C; first += chunk) {
    const int64_t width = std::min(chunk, C - first), item = int64_t(w_hat.element_size());
    const char* rows = static_cast<const char*>(w_hat.const_data_ptr()) + first * D * item;
    multiply(x, whole(x), Matrix{rows, w_hat.scalar_type(), width, D, D}.transposed(),
             {product.const_data_ptr(), ScalarType::Float, N, width, width});
    launch("scale_columns", queue, scale_columns_kernel,
           Grid{N, std::min<int64_t>(64, (width + kThreads - 1) / kThreads)}, kThreads, 0,
           static_cast<const float*>(product.const_data_ptr()), width, StoredArray(out), C, first, scale);
  }
}

void scale_into(Queue& queue, const Tensor& from, const Tensor& to, const Scale& scale) {
  const int64_t count = from.numel();
  const int64_t blocks = std::min<int64_t>((count + kThreads - 1) / kThreads, 32 * queue.multiprocessors());
  dispatch_accumulator(from.scalar_type(), [&]<class T>() {
    launch("scale", queue, scale_kernel<T>, Grid{blocks}, kThreads, 0, StoredArray(from), StoredArray(to),
           count, scale);
  });
}

Tensor norm_linear(const NormLinearArguments& in) {
  const Tensor &x = in.x, &weight = in.weight;
  check_head(in.kName, x, weight);
  check_number(in.kName, "scale", in.scale, x);
  Queue queue(x);
  if (x.size(1) == 0) return torch::stable::new_zeros(x, {x.size(0), weight.size(0)});
  const ScalarType type = x.scalar_type();
  const bool half = type == ScalarType::Half;
  const Scale s(in.scale, in.scale_value);
  const Tensor out = device_empty(x, {x.size(0), weight.size(0)}, type);
  if (half && !in.normalize_input) {
    scale_products(queue, x, unit_rows_of(queue, weight, in.eps, type, nullptr), s, out);
    return out;
  }
  const auto part = [&](FactorPart of_half) { return half ? of_half : FactorPart::kWhole; };
  const Tensor left = in.normalize_input
                          ? unit_rows_of(queue, x, in.eps, type, nullptr, s, part(FactorPart::kSignedRoot))
                          : x;
  const Tensor right = unit_rows_of(queue, weight, in.eps, type, nullptr,
                                    half || !in.normalize_input ? s : kOne, part(FactorPart::kRoot));
  multiply(x, whole(left), whole(right).transposed(), whole(out));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> norm_linear_backward(const NormLinearBackwardArguments& in) {
  const Tensor &grad = in.grad, &x = in.x, &weight = in.weight;
  check_head(in.kName, x, weight);
  check_number(in.kName, "scale", in.scale, x);
  check_exact(in.kName, "grad", grad, x.scalar_type(), {x.size(0), weight.size(0)});
  Queue queue(x);
  const ScalarType type = x.scalar_type(), wide = accumulator(type);
  const Scale s(in.scale, in.scale_value);
  const Tensor x_inverse = device_empty(x, {x.size(0)}, wide);
  const Tensor x_hat = in.normalize_input ? unit_rows_of(queue, x, in.eps, type, &x_inverse) : x;
  Tensor dx = device_empty(x, in.need_x ? x.sizes() : torch::headeronly::IntHeaderOnlyArrayRef({0}), type);
  Tensor dw = in.need_weight ? torch::stable::empty_like(weight) : device_empty(x, {0}, weight.scalar_type());
  Tensor ds =
      in.need_scale ? device_empty(x, {}, ScalarType::Double) : device_empty(x, {0}, ScalarType::Double);

  if (in.need_x || in.need_scale) {
    const Tensor w_hat = unit_rows_of(queue, weight, in.eps, type, nullptr);
    const Tensor sum = device_empty(x, x.sizes(), wide);  // sum over j of G_ij w_hat_j
    multiply(x, whole(grad), whole(w_hat), whole(sum));
    if (in.need_scale) dot(queue, x_hat, sum, static_cast<double*>(ds.mutable_data_ptr()));
    if (in.need_x && in.normalize_input) {
      project_rows(queue, {x.const_data_ptr(), type, x.size(0), x.size(1), in.eps, x_inverse.const_data_ptr(),
                           sum.const_data_ptr(), dx.mutable_data_ptr(), s});
    } else if (in.need_x) {
      scale_into(queue, sum, dx, s);
    }
  }
  if (in.need_weight) {
    const bool direct = weight.scalar_type() == wide;
    const Tensor product = direct ? dw : device_empty(x, weight.sizes(), wide);
    multiply(x, whole(grad).transposed(), whole(x_hat), whole(product));
    project_rows(queue, {weight.const_data_ptr(), weight.scalar_type(), weight.size(0), weight.size(1),
                         in.eps, nullptr, product.const_data_ptr(), dw.mutable_data_ptr(), s});
  }
  return {dx, dw, ds};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  nf::implement<&nf::norm_linear>(m);
  nf::implement<&nf::norm_linear_backward>(m);
}
