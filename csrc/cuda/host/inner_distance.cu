// inner_distance on CUDA. The squared distance and its gradients are products by cuBLAS, finished by
// kernels that compute the cells too near from the differences (math/distance.h). L1 has no product:
// forward and backward are tiled kernels of our own, 64 x 64 results per block.
#include <optional>

#include "cuda/device/distance_kernels.cuh"
#include "cuda/device/own_rows.cuh"
#include "cuda/host/outputs.h"
#include "engine/distance_arguments.h"
#include "engine/distance_checks.h"

namespace nf {
namespace {

Matrix whole(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type(), t.size(0), t.size(1), t.size(1)};
}

// The factors of a product have one type: their own where they share it, else the accumulator's.
ScalarType common_type(ScalarType a, ScalarType b) { return a == b ? a : accumulator(a); }

int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }

template <class T>
void squared_forward(Queue& queue, const Tensor& x, const Tensor& weight, const Tensor& out,
                     unsigned* near_cells) {
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0);
  const ScalarType wide = accumulator(x.scalar_type()),
                   type = common_type(x.scalar_type(), weight.scalar_type());
  const Tensor xs = torch::stable::to(x, type), ws = torch::stable::to(weight, type);
  const Tensor xx = device_empty(x, {N}, wide), ww = device_empty(x, {C}, wide);
  for (const auto& [rows, sums] : {std::pair(&x, &xx), std::pair(&weight, &ww)})
    launch("row_sums", queue, row_sums_kernel<T>, warp_per_row(rows->size(0)), kThreads, 0,
           StoredArray(*rows), rows->size(0), D, true, data_of<T>(*sums));
  const bool direct = out.scalar_type() == wide;
  // Whole words of near cells.
  const int64_t fits = std::max<int64_t>(1, kCellsAtOnce / std::max<int64_t>(1, N) / kNearBits) * kNearBits;
  const int64_t chunk = direct ? C : std::min(C, fits);
  const Tensor scratch = device_empty(x, {direct ? 0 : N, chunk}, wide);
  const Tensor& products = direct ? out : scratch;
  const int64_t item = int64_t(ws.element_size());
  for (int64_t first = 0; first < C; first += chunk) {
    const int64_t width = std::min(chunk, C - first);
    const char* rows = static_cast<const char*>(ws.const_data_ptr()) + first * D * item;
    multiply(x, whole(xs), Matrix{rows, type, width, D, D}.transposed(),
             {products.const_data_ptr(), wide, N, width, chunk});
    launch("finish_squared", queue, finish_squared_kernel<T>, Grid{tiles_of(N) * tiles_of(width)}, kThreads,
           2 * shared_bytes<T>(kDepth * kTile) + shared_bytes<int>(kThreads / kWarp),
           FinishSquared<T>{data_of<const T>(products), chunk, StoredArray(x), StoredArray(weight),
                            data_of<const T>(xx), data_of<const T>(ww), N, D, C, first, width,
                            StoredArray(out), near_cells});
  }
}

std::tuple<Tensor, Tensor> inner_distance(const InnerDistanceArguments& in) {
  const Tensor &x = in.x, &weight = in.weight;
  check_distance(in.kName, x, weight, in.p);
  Queue queue(x);
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0);
  const bool marks = in.need_near && in.p == 2;
  const Tensor near_cells = marks ? torch::stable::new_zeros(x, {N, near_words(C)}, ScalarType::Int)
                                  : device_empty(x, {0}, ScalarType::Int);
  if (D == 0) return {torch::stable::new_zeros(x, {N, C}), near_cells};
  Tensor out = device_empty(x, {N, C}, x.scalar_type());
  dispatch_accumulator(x.scalar_type(), [&]<class T>() {
    if (in.p == 2)
      squared_forward<T>(queue, x, weight, out, marks ? data_of<unsigned>(near_cells) : nullptr);
    else
      launch("manhattan", queue, manhattan_kernel<T>,
             Grid{((N + kTile - 1) / kTile) * ((C + kTile - 1) / kTile)}, kThreads,
             2 * shared_bytes<T>(kDepth * kTile), StoredArray(x), StoredArray(weight), N, C, D,
             StoredArray(out));
  });
  return {out, near_cells};
}

// The gradient of one side.
struct Side {
  const Tensor& own;    // [rows, D]
  const Tensor& other;  // [others, D]
  const Tensor& grad;   // [N, C]
  const Tensor& near;   // [N, C] or empty
  bool transposed;      // own is the agents
};

template <class T, int kOrder>
void launch_slopes(Queue& queue, const Side& side, const Tensor* marks, const Tensor* total,
                   const Tensor* product, const Tensor& out) {
  const int64_t rows = side.own.size(0), D = side.own.size(1);
  const Cells cells{StoredArray(side.grad), side.grad.size(1), side.transposed,
                    data_of<const unsigned>(side.near),
                    marks != nullptr ? data_of<const int>(*marks) : nullptr};
  const auto numbers = [](const Tensor* t) { return t != nullptr ? data_of<const T>(*t) : nullptr; };
  launch("slopes", queue, slopes_kernel<T, kOrder>, Grid{tiles_of(rows) * tiles_of(D)}, kThreads,
         2 * shared_bytes<T>(kDepth * kTile), StoredArray(side.own), StoredArray(side.other), cells, rows,
         side.other.size(0), D, numbers(total), numbers(product), StoredArray(out));
}

template <class T>
void squared_backward(Queue& queue, const Side& side, const Tensor& out) {
  const Tensor &own = side.own, &grad = side.grad;
  const int64_t rows = own.size(0), D = own.size(1), N = grad.size(0), C = grad.size(1);
  const ScalarType wide = accumulator(own.scalar_type());
  const ScalarType type = common_type(grad.scalar_type(), side.other.scalar_type());
  const Tensor far = device_empty(own, {N, C}, type), factor = torch::stable::to(side.other, type);
  const Tensor marks = device_empty(own, {tiles_of(N) * tiles_of(C)}, ScalarType::Int);
  launch("far_cells", queue, far_cells_kernel<T>, Grid{tiles_of(N) * tiles_of(C)}, kThreads,
         shared_bytes<int>(kThreads / kWarp), StoredArray(grad), data_of<const unsigned>(side.near), N, C,
         StoredArray(far), data_of<int>(marks));
  const bool direct = out.scalar_type() == wide;
  const Tensor product = direct ? out : device_empty(own, {rows, D}, wide);
  multiply(own, side.transposed ? whole(far).transposed() : whole(far), whole(factor), whole(product));
  const Tensor total = device_empty(own, {rows}, wide);
  if (side.transposed)
    launch("column_sums", queue, column_sums_kernel<T>, Grid{(rows + kThreads - 1) / kThreads}, kThreads, 0,
           StoredArray(far), N, rows, data_of<T>(total));
  else
    launch("row_sums", queue, row_sums_kernel<T>, warp_per_row(rows), kThreads, 0, StoredArray(far), rows, C,
           false, data_of<T>(total));
  launch_slopes<T, 2>(queue, side, &marks, &total, &product, out);
}

std::tuple<Tensor, Tensor> inner_distance_backward(const InnerDistanceBackwardArguments& in) {
  const Tensor &grad = in.grad, &near = in.near, &x = in.x, &weight = in.weight;
  check_distance_backward(in.kName, grad, near, x, weight, in.labels, in.p);
  Queue queue(x);
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0);
  Tensor dx = gradient_like(x, in.need_x, false),
         dw = gradient_like(weight, in.need_weight, in.labels || N == 0);
  if (N == 0 || D == 0) return {dx, dw};
  dispatch_accumulator(x.scalar_type(), [&]<class T>() {
    const auto run = [&](const Side& side, const Tensor& out) {
      if (in.p == 2)
        squared_backward<T>(queue, side, out);
      else
        launch_slopes<T, 1>(queue, side, nullptr, nullptr, nullptr, out);
    };
    if (in.need_x) run({x, weight, grad, near, false}, dx);
    if (in.need_weight && !in.labels) run({weight, x, grad, near, true}, dw);
    if (in.need_weight && in.labels) own_rows_gradient<T>(queue, grad, x, weight, *in.labels, int(in.p), dw);
  });
  return {dx, dw};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  nf::implement<&nf::inner_distance>(m);
  nf::implement<&nf::inner_distance_backward>(m);
}
