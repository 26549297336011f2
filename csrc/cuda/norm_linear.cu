// norm_linear, s * cos(x_i, w_j), on CUDA: unit rows by our kernels, products by cuBLAS. The unit rows
// have the dtype of the result, the sums in the products and in dW are float32.
#include <optional>

#include "gemm.h"
#include "reduce.cuh"
#include "rows.h"
#include "stored.cuh"

namespace nf {
namespace {

constexpr int kThreads = 256;

// x_hat[i] = x_i / ||x_i|| (or x_i), stored as `type`.
Tensor unit_features(Queue& queue, const Tensor& x, bool normalize_input, double eps, ScalarType type,
                     const Tensor* inverse) {
  if (!normalize_input) return torch::stable::to(x, type);
  Tensor y = device_empty(x, x.sizes(), type);
  UnitRows task{x.const_data_ptr(), x.scalar_type(), x.size(0), x.size(1), 2, eps};
  task.y = y.mutable_data_ptr();
  task.y_type = type;
  task.inverse = inverse != nullptr ? inverse->mutable_data_ptr() : nullptr;
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

// total = sum of a[i] b[i], by one block: [N, D] is small beside the products before it.
template <class T>
NF_KERNEL(kThreads)
dot_kernel(StoredArray a, StoredArray b, int64_t count, double* total) {
  SharedMemory shared;
  double* scratch = shared.take<double>(kThreads / kWarp);
  double sum = 0;
  for (int64_t i = thread_id(); i < count; i += kThreads) sum += double(a.load<T>(i)) * double(b.load<T>(i));
  sum = block_sum(sum, scratch);
  if (thread_id() == 0) *total = sum;
}

void scale_into(Queue& queue, const Tensor& from, const Tensor& to, const Scale& scale) {
  const int64_t count = from.numel();
  const int64_t blocks = std::min<int64_t>((count + kThreads - 1) / kThreads, 32 * queue.multiprocessors());
  dispatch_accumulator(from.scalar_type(), [&]<class T>() {
    launch("scale", queue, scale_kernel<T>, Grid{blocks}, kThreads, 0, StoredArray(from), StoredArray(to),
           count, scale);
  });
}

Tensor norm_linear(Tensor x, Tensor weight, std::optional<Tensor> scale, double scale_value,
                   bool normalize_input, double eps) {
  check_head("norm_linear", x, weight);
  Queue queue(x);
  const ScalarType type = x.scalar_type();
  const Tensor x_hat = unit_features(queue, x, normalize_input, eps, type, nullptr);
  const Tensor w_hat = unit_features(queue, weight, true, eps, type, nullptr);
  const Tensor out = device_empty(x, {x.size(0), weight.size(0)}, type);
  // The scale goes onto the smaller factor, before the one rounding of the result.
  const Tensor scaled = device_empty(x, x.sizes(), type);
  scale_into(queue, x_hat, scaled, Scale(scale, scale_value));
  if (x.size(1) == 0) return torch::stable::new_zeros(x, {x.size(0), weight.size(0)});
  multiply(x, whole(scaled), whole(w_hat).transposed(), whole(out));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> norm_linear_backward(Tensor grad, Tensor x, Tensor weight,
                                                        std::optional<Tensor> scale, double scale_value,
                                                        bool normalize_input, double eps, bool need_x,
                                                        bool need_weight, bool need_scale) {
  const char* op = "norm_linear_backward";
  check_head(op, x, weight);
  check_matrix(op, "grad", grad);
  check_shape(op, "grad", grad, x.size(0), weight.size(0));
  Queue queue(x);
  const ScalarType type = x.scalar_type(), wide = accumulator(type);
  const Scale s(scale, scale_value);
  const Tensor x_inverse = device_empty(x, {x.size(0)}, wide);
  const Tensor x_hat = unit_features(queue, x, normalize_input, eps, type, &x_inverse);
  Tensor dx = device_empty(x, need_x ? x.sizes() : torch::headeronly::IntHeaderOnlyArrayRef({0}), type);
  Tensor dw = need_weight ? torch::stable::empty_like(weight) : device_empty(x, {0}, weight.scalar_type());
  Tensor ds = need_scale ? device_empty(x, {}, ScalarType::Double) : device_empty(x, {0}, ScalarType::Double);

  if (need_x || need_scale) {
    const Tensor w_hat = unit_features(queue, weight, true, eps, type, nullptr);
    const Tensor sum = device_empty(x, x.sizes(), wide);  // sum over j of G_ij w_hat_j
    multiply(x, whole(grad), whole(w_hat), whole(sum));
    if (need_scale)
      dispatch_accumulator(wide, [&]<class T>() {
        launch("dot", queue, dot_kernel<T>, Grid{1}, kThreads, shared_bytes<double>(kThreads / kWarp),
               StoredArray(x_hat), StoredArray(sum), sum.numel(),
               static_cast<double*>(ds.mutable_data_ptr()));
      });
    if (need_x && normalize_input) {
      scale_into(queue, sum, sum, s);
      project_rows(queue, {x.const_data_ptr(), type, x.size(0), x.size(1), eps, x_inverse.const_data_ptr(),
                           sum.const_data_ptr(), dx.mutable_data_ptr()});
    } else if (need_x) {
      scale_into(queue, sum, dx, s);
    }
  }
  if (need_weight) {
    const Tensor scaled = device_empty(x, x.sizes(), type);
    scale_into(queue, x_hat, scaled, s);
    const bool direct = weight.scalar_type() == wide;
    const Tensor product = direct ? dw : device_empty(x, weight.sizes(), wide);
    multiply(x, whole(grad).transposed(), whole(scaled), whole(product));
    project_rows(queue, {weight.const_data_ptr(), weight.scalar_type(), weight.size(0), weight.size(1), eps,
                         nullptr, product.const_data_ptr(), dw.mutable_data_ptr()});
  }
  return {dx, dw, ds};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  m.impl("norm_linear", TORCH_BOX(&nf::norm_linear));
  m.impl("norm_linear_backward", TORCH_BOX(&nf::norm_linear_backward));
}
