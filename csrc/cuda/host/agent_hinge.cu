// The hinge losses over agents on CUDA (csrc/cpu/agent_hinge.cpp has the plan, csrc/math/terms/hinge.h the
// formulas): cosines by cuBLAS in the accumulator type, one chunk of classes at a time; every row is
// folded by one block, which lists what is active in the order of the classes. No atomics: runs repeat
// bit by bit. The margin may be a tensor and is read on the device; nothing is read back.
#include <optional>

#include "cuda/device/hinge_kernels.cuh"
#include "cuda/host/rows.h"
#include "engine/hinge_checks.h"

namespace nf {
namespace {

int64_t chunk_of(const Tensor& weight, int64_t class_chunk) {
  return std::max<int64_t>(1, std::min(class_chunk, weight.size(0)));
}

// Unit rows of the classes [first, first + width) and the cosines [N, width] with them.
template <class T>
void score_chunk(Queue& queue, const Tensor& x_hat, const Tensor& weight, int64_t first, int64_t width,
                 double eps, const Tensor& w_hat, T* inverse, const Tensor& scores) {
  const int64_t N = x_hat.size(0), D = x_hat.size(1), item = int64_t(weight.element_size());
  const ScalarType wide = x_hat.scalar_type();
  UnitRows task{static_cast<const char*>(weight.const_data_ptr()) + first * D * item,
                weight.scalar_type(),
                width,
                D,
                2,
                eps};
  task.y = w_hat.mutable_data_ptr();
  task.y_type = wide;
  task.inverse = inverse;
  unit_rows(queue, task);
  multiply(x_hat, {x_hat.const_data_ptr(), wide, N, D, D},
           Matrix{w_hat.const_data_ptr(), wide, width, D, D}.transposed(),
           {scores.const_data_ptr(), wide, N, width, width});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> agent_hinge(const AgentHingeArguments& in) {
  check(in);
  const Tensor &x = in.x, &weight = in.weight;
  Queue queue(x);
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0), chunk = chunk_of(weight, in.class_chunk);
  const int64_t listed = 1 + std::max<int64_t>(0, in.capacity);
  const ScalarType wide = accumulator(x.scalar_type());
  Tensor target = device_empty(x, {N}, wide), value = device_empty(x, {N}, wide);
  Tensor rows_tensor = device_empty(x, {kHingeFields, N}, ScalarType::Double);
  Tensor inverse_norm = device_empty(x, {C}, wide);
  Tensor classes = device_empty(x, {N, listed}, ScalarType::Long);
  Tensor slopes = in.exponential ? device_empty(x, {N, listed}, wide) : device_empty(x, {0}, wide);
  const Tensor x_hat = device_empty(x, {N, D}, wide), w_hat = device_empty(x, {chunk, D}, wide);
  const Tensor scores = device_empty(x, {N, chunk}, wide);
  dispatch_accumulator(wide, [&]<class T>() {
    const HingeRows rows(rows_tensor);
    const ActiveList<T> list{data_of<int64_t>(classes), data_of<T>(slopes), listed};
    launch("prepare_hinge", queue, prepare_hinge_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(x),
           data_of<const int64_t>(in.labels), data_of<const double>(in.target_cosine), D, C, in.ignore_index,
           in.eps, Scale(in.margin, in.margin_value), in.triplet, rows, StoredArray(x_hat), list,
           data_of<T>(target));
    for (int64_t first = 0; first < C; first += chunk) {
      const int64_t width = std::min(chunk, C - first);
      score_chunk<T>(queue, x_hat, weight, first, width, in.eps, w_hat, data_of<T>(inverse_norm) + first,
                     scores);
      launch("fold", queue, fold_kernel<T>, Grid{N}, kThreads,
             shared_bytes<double>(kWarps) + shared_bytes<int>(kWarps), data_of<const T>(scores), width, first,
             data_of<const int64_t>(in.labels), in.hardest, in.exponential, rows, list);
    }
    launch("finish_hinge", queue, finish_hinge_kernel<T>, thread_per(N), kThreads, 0, in.hardest,
           in.exponential, rows, list, data_of<T>(value));
  });
  return {target, value, rows_tensor, inverse_norm, classes, slopes};
}

template <class T>
void backward(Queue& queue, const AgentHingeBackwardArguments& in, Tensor* dx, Tensor* dw) {
  const Tensor &x = in.x, &weight = in.weight;
  const double eps = in.eps;
  const int64_t chunk = chunk_of(weight, in.class_chunk);
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0), item = int64_t(weight.element_size());
  const ScalarType wide = accumulator(x.scalar_type());
  const HingeRows rows(in.rows);
  const Tensor x_hat = device_empty(x, {N, D}, wide), w_hat = device_empty(x, {chunk, D}, wide);
  const Tensor scores = device_empty(x, {N, chunk}, wide);
  const bool direct = weight.scalar_type() == wide;  // the product can go where the result will be
  const Tensor product = device_empty(x, {dw != nullptr && !direct ? chunk : 0, D}, wide);
  const Tensor sum = device_empty(x, {dx != nullptr ? N : 0, D}, wide);
  const Tensor part = device_empty(x, {dx != nullptr && chunk < C ? N : 0, D}, wide);
  launch("unit_features", queue, unit_features_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(x), D,
         eps, rows, data_of<T>(x_hat));
  for (int64_t first = 0; first < C; first += chunk) {
    const int64_t width = std::min(chunk, C - first);
    score_chunk<T>(queue, x_hat, weight, first, width, eps, w_hat, nullptr, scores);
    launch("hinge_gradients", queue, hinge_gradients_kernel<T>,
           Grid{N, std::min<int64_t>(64, (width + kThreads - 1) / kThreads)}, kThreads, 0, data_of<T>(scores),
           width, first, data_of<const int64_t>(in.labels), data_of<const T>(in.target_factor),
           data_of<const T>(in.hinge_factor), in.exponential, rows);
    const Matrix g{scores.const_data_ptr(), wide, N, width, width};
    if (dx != nullptr) {
      multiply(x, g, {w_hat.const_data_ptr(), wide, width, D, D},
               {(first == 0 ? sum : part).const_data_ptr(), wide, N, D, D});
      if (first > 0)
        launch("add", queue, add_kernel<T>, thread_per(N * D), kThreads, 0, data_of<const T>(part), N * D,
               data_of<T>(sum));
    }
    if (dw == nullptr) continue;
    char* out = static_cast<char*>(dw->mutable_data_ptr()) + first * D * item;
    T* into = direct ? reinterpret_cast<T*>(out) : data_of<T>(product);
    multiply(x, g.transposed(), {x_hat.const_data_ptr(), wide, N, D, D}, {into, wide, width, D, D});
    project_rows(queue,
                 {static_cast<const char*>(weight.const_data_ptr()) + first * D * item, weight.scalar_type(),
                  width, D, eps, data_of<const T>(in.inverse_norm) + first, into, out});
  }
  if (dx != nullptr)
    launch("finish_features", queue, finish_features_kernel<T>, warp_per_row(N), kThreads, 0, StoredArray(x),
           D, eps, rows, data_of<const T>(sum), StoredArray(*dx));
}

std::tuple<Tensor, Tensor> agent_hinge_backward(const AgentHingeBackwardArguments& in) {
  check(in);
  Queue queue(in.x);
  const bool empty = in.x.numel() == 0 || in.weight.numel() == 0;
  Tensor dx = partial_gradient_like(in.x, in.need_x, in.is_shard, empty),
         dw = gradient_like(in.weight, in.need_weight, empty);
  if (empty) return {dx, dw};
  dispatch_accumulator(in.x.scalar_type(), [&]<class T>() {
    backward<T>(queue, in, in.need_x ? &dx : nullptr, in.need_weight ? &dw : nullptr);
  });
  return {dx, dw};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  nf::implement<&nf::agent_hinge>(m);
  nf::implement<&nf::agent_hinge_backward>(m);
}
