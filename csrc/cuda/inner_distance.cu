// inner_distance on CUDA. The squared distance is one product by cuBLAS, whose cells are finished by a
// kernel that computes those too near from the differences (math/distance.h). L1 has no product: forward
// and backward are tiled kernels of our own, 64 x 64 results per block.
#include <optional>

#include "agent_rows.cuh"
#include "distance_checks.h"
#include "math/distance.h"

namespace nf {
namespace {

constexpr int kThreads = kRowThreads;
constexpr int kRowsPerBlock = kThreads / kWarp;
constexpr int kTile = 64;                           // results per block: kTile x kTile
constexpr int kSide = 16;                           // threads per side of it: kSide * kSide = kThreads
constexpr int kOwn = kTile / kSide;                 // results per thread and side
constexpr int kDepth = 16;                          // of the third axis, per step
constexpr int64_t kCellsAtOnce = int64_t(1) << 26;  // wide scratch of a 16-bit result

// sum[r] = sum of x[r]^2 (squared) or of x[r]. One warp per row.
template <class T>
NF_KERNEL(kThreads)
row_sums_kernel(StoredArray x, int64_t rows, int64_t length, bool squared, T* __restrict__ sum) {
  const int64_t r = block_id() * kRowsPerBlock + warp_id();
  if (r >= rows) return;  // the whole warp leaves
  T total = 0;
  for (int64_t d = lane_id(); d < length; d += kWarp) {
    const T v = x.load<T>(r * length + d);
    total += squared ? v * v : v;
  }
  total = warp_sum(total);
  if (lane_id() == 0) sum[r] = total;
}

// sum[j] = sum over i of g[i, j]. One thread per column: neighbours read neighbours.
template <class T>
NF_KERNEL(kThreads)
column_sums_kernel(StoredArray g, int64_t rows, int64_t columns, T* __restrict__ sum) {
  const int64_t j = block_id() * kThreads + thread_id();
  if (j >= columns) return;
  T total = 0;
  for (int64_t i = 0; i < rows; ++i) total += g.load<T>(i * columns + j);
  sum[j] = total;
}

// products <x, w> -> squared distances. A warp takes 32 neighbouring cells of a row; those too near
// are computed again by the warp together.
template <class T>
NF_KERNEL(kThreads)
finish_squared_kernel(const T* products, int64_t stride,  // [N, stride], `width` of them valid
                      StoredArray x, StoredArray w,       // [N, D], [C, D]
                      const T* __restrict__ xx, const T* __restrict__ ww,  // [N], [C]
                      int64_t batch, int64_t dim, int64_t classes, int64_t first, int64_t width,
                      StoredArray out)  // [N, C], perhaps where the products are
{
  const int64_t groups = (width + kWarp - 1) / kWarp;
  const int64_t task = block_id() * kRowsPerBlock + warp_id();
  if (task >= batch * groups) return;  // the whole warp leaves
  const int64_t i = task / groups, start = task % groups * kWarp, j = start + lane_id();
  const bool valid = j < width;
  T d = 0;
  bool again = false;
  if (valid) {
    d = math::distance_from_products(xx[i], ww[first + j], products[i * stride + j]);
    again = math::distance_needs_differences(d, xx[i], ww[first + j]);
  }
  unsigned near = warp_ballot(again);
  for (int lane = 0; near != 0; ++lane, near >>= 1) {
    if ((near & 1u) == 0) continue;
    T sum = 0;
    for (int64_t k = lane_id(); k < dim; k += kWarp)
      sum += math::distance_term<T>(2, x.load<T>(i * dim + k) - w.load<T>((first + start + lane) * dim + k))
                 .value;
    sum = warp_sum(sum);
    if (lane_id() == lane) d = sum;
  }
  if (valid) out.store<T>(i * classes + first + j, d);
}

// out[m, n] = sum over k of |a[m, k] - b[n, k]|. Blocks: tiles of m x tiles of n.
template <class T>
NF_KERNEL(kThreads)
manhattan_kernel(StoredArray a, StoredArray b, int64_t rows, int64_t columns, int64_t depth,
                 StoredArray out) {
  SharedMemory shared;
  T* left = shared.take<T>(kDepth * kTile);   // [kDepth, kTile]
  T* right = shared.take<T>(kDepth * kTile);  // [kDepth, kTile]
  const int64_t tiles = (columns + kTile - 1) / kTile;
  const int64_t m0 = block_id() / tiles * kTile, n0 = block_id() % tiles * kTile;
  const int row = thread_id() / kSide, column = thread_id() % kSide;
  T sum[kOwn][kOwn] = {};
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    sync_block();  // the reads below of the step before, before these writes
#pragma unroll 1   // unrolled, the staging copies cost predicates that spill
    for (int e = thread_id(); e < kTile * kDepth; e += kThreads) {
      const int r = e / kDepth, k = e % kDepth;
      const bool inside = k0 + k < depth;
      left[k * kTile + r] = inside && m0 + r < rows ? a.load<T>((m0 + r) * depth + k0 + k) : T(0);
      right[k * kTile + r] = inside && n0 + r < columns ? b.load<T>((n0 + r) * depth + k0 + k) : T(0);
    }
    sync_block();  // the writes above, before the reads below
    for (int k = 0; k < kDepth; ++k)
      for (int m = 0; m < kOwn; ++m)
        for (int n = 0; n < kOwn; ++n)
          sum[m][n] += math::distance_term<T>(
                           1, left[k * kTile + m * kSide + row] - right[k * kTile + n * kSide + column])
                           .value;
  }
  for (int m = 0; m < kOwn; ++m)
    for (int n = 0; n < kOwn; ++n) {
      const int64_t i = m0 + m * kSide + row, j = n0 + n * kSide + column;
      if (i < rows && j < columns) out.store<T>(i * columns + j, sum[m][n]);
    }
}

// out[m, d] = sum over k of g(m, k) slope(a[m, d] - b[k, d]), the L1 gradient of either side; g(m, k)
// lies at m * g_row + k * g_column. Blocks: tiles of m x tiles of d.
template <class T>
NF_KERNEL(kThreads)
manhattan_gradient_kernel(StoredArray a, StoredArray b, StoredArray g, int64_t rows, int64_t others,
                          int64_t dim, int64_t g_row, int64_t g_column, StoredArray out) {
  SharedMemory shared;
  T* weights = shared.take<T>(kDepth * kTile);  // [kDepth, kTile] of g
  T* other = shared.take<T>(kDepth * kTile);    // [kDepth, kTile] of b
  const int64_t tiles = (dim + kTile - 1) / kTile;
  const int64_t m0 = block_id() / tiles * kTile, d0 = block_id() % tiles * kTile;
  const int row = thread_id() / kSide, column = thread_id() % kSide;
  T own[kOwn][kOwn], sum[kOwn][kOwn] = {};
  for (int m = 0; m < kOwn; ++m)
    for (int d = 0; d < kOwn; ++d) {
      const int64_t i = m0 + m * kSide + row, at = d0 + d * kSide + column;
      own[m][d] = i < rows && at < dim ? a.load<T>(i * dim + at) : T(0);
    }
  for (int64_t k0 = 0; k0 < others; k0 += kDepth) {
    sync_block();  // the reads below of the step before, before these writes
#pragma unroll 1   // unrolled, the staging copies cost predicates that spill
    for (int e = thread_id(); e < kTile * kDepth; e += kThreads) {
      const int k = e / kTile, r = e % kTile;
      const bool inside = k0 + k < others;
      weights[k * kTile + r] =
          inside && m0 + r < rows ? g.load<T>((m0 + r) * g_row + (k0 + k) * g_column) : T(0);
      other[k * kTile + r] = inside && d0 + r < dim ? b.load<T>((k0 + k) * dim + d0 + r) : T(0);
    }
    sync_block();  // the writes above, before the reads below
    for (int k = 0; k < kDepth; ++k)
      for (int m = 0; m < kOwn; ++m)
        for (int d = 0; d < kOwn; ++d)
          sum[m][d] += weights[k * kTile + m * kSide + row] *
                       math::distance_term<T>(1, own[m][d] - other[k * kTile + d * kSide + column]).slope;
  }
  for (int m = 0; m < kOwn; ++m)
    for (int d = 0; d < kOwn; ++d) {
      const int64_t i = m0 + m * kSide + row, at = d0 + d * kSide + column;
      if (i < rows && at < dim) out.store<T>(i * dim + at, sum[m][d]);
    }
}

// out[r, d] = 2 (total[r] a[r, d] - product[r, d]): the gradient of the squared distance.
template <class T>
NF_KERNEL(kThreads)
squared_gradient_kernel(StoredArray a, const T* __restrict__ total, const T* product, int64_t rows,
                        int64_t dim, StoredArray out)  // perhaps where the product is
{
  const int64_t r = block_id() * kRowsPerBlock + warp_id();
  if (r >= rows) return;
  for (int64_t d = lane_id(); d < dim; d += kWarp)
    out.store<T>(r * dim + d, T(2) * (total[r] * a.load<T>(r * dim + d) - product[r * dim + d]));
}

// dw[y_i] from the rows with that label alone, computed by the first of them; dw comes in zero. One
// warp per row.
template <class T>
NF_KERNEL(kThreads)
own_rows_gradient_kernel(StoredArray g, StoredArray x, StoredArray w,  // [N, C], [N, D], [C, D]
                         const int64_t* __restrict__ labels,           // [N]
                         int64_t batch, int64_t dim, int64_t classes, int p, StoredArray dw) {
  const int64_t i = block_id() * kRowsPerBlock + warp_id();
  if (i >= batch) return;  // the whole warp leaves
  const int64_t label = labels[i];
  NF_DEVICE_CHECK(label >= 0 && label < classes,
                  "inner_distance: expected `labels` in [0, %lld), got %lld at row %lld", (long long)classes,
                  (long long)label, (long long)i);
  bool earlier = false;
  for (int64_t k = lane_id(); k < i; k += kWarp) earlier = earlier || labels[k] == label;
  if (warp_any(earlier)) return;
  for (int64_t d = lane_id(); d < dim; d += kWarp) {
    const T agent = w.load<T>(label * dim + d);
    T sum = 0;
    for (int64_t k = i; k < batch; ++k)
      if (labels[k] == label)
        sum +=
            g.load<T>(k * classes + label) * math::distance_term<T>(p, agent - x.load<T>(k * dim + d)).slope;
    dw.store<T>(label * dim + d, sum);
  }
}

Matrix whole(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type(), t.size(0), t.size(1), t.size(1)};
}

// The factors of a product have one type: their own where they share it, else the accumulator's.
ScalarType common_type(ScalarType a, ScalarType b) { return a == b ? a : accumulator(a); }

template <class T>
void squared_forward(Queue& queue, const Tensor& x, const Tensor& weight, const Tensor& out) {
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0);
  const ScalarType wide = accumulator(x.scalar_type()),
                   type = common_type(x.scalar_type(), weight.scalar_type());
  const Tensor xs = torch::stable::to(x, type), ws = torch::stable::to(weight, type);
  const Tensor xx = device_empty(x, {N}, wide), ww = device_empty(x, {C}, wide);
  for (const auto& [rows, sums] : {std::pair(&x, &xx), std::pair(&weight, &ww)})
    launch("row_sums", queue, row_sums_kernel<T>, warp_per_row(rows->size(0)), kThreads, 0,
           StoredArray(*rows), rows->size(0), D, true, data_of<T>(*sums));
  const bool direct = out.scalar_type() == wide;
  const int64_t chunk =
      direct ? C : std::min(C, std::max<int64_t>(1, kCellsAtOnce / std::max<int64_t>(1, N)));
  const Tensor scratch = device_empty(x, {direct ? 0 : N, chunk}, wide);
  const Tensor& products = direct ? out : scratch;
  const int64_t item = int64_t(ws.element_size());
  for (int64_t first = 0; first < C; first += chunk) {
    const int64_t width = std::min(chunk, C - first), groups = (width + kWarp - 1) / kWarp;
    const char* rows = static_cast<const char*>(ws.const_data_ptr()) + first * D * item;
    multiply(x, whole(xs), Matrix{rows, type, width, D, D}.transposed(),
             {products.const_data_ptr(), wide, N, width, chunk});
    launch("finish_squared", queue, finish_squared_kernel<T>, warp_per_row(N * groups), kThreads, 0,
           data_of<const T>(products), chunk, StoredArray(x), StoredArray(weight), data_of<const T>(xx),
           data_of<const T>(ww), N, D, C, first, width, StoredArray(out));
  }
}

Tensor inner_distance(Tensor x, Tensor weight, int64_t p) {
  check_distance("inner_distance", x, weight, p);
  Queue queue(x);
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0);
  if (D == 0) return torch::stable::new_zeros(x, {N, C});
  Tensor out = device_empty(x, {N, C}, x.scalar_type());
  dispatch_accumulator(x.scalar_type(), [&]<class T>() {
    if (p == 2)
      squared_forward<T>(queue, x, weight, out);
    else
      launch("manhattan", queue, manhattan_kernel<T>,
             Grid{((N + kTile - 1) / kTile) * ((C + kTile - 1) / kTile)}, kThreads,
             2 * shared_bytes<T>(kDepth * kTile), StoredArray(x), StoredArray(weight), N, C, D,
             StoredArray(out));
  });
  return out;
}

// The gradient of `own` [rows, D]; g is the upstream gradient as [rows, others].
template <class T>
void squared_backward(Queue& queue, const Tensor& own, const Tensor& other, const Tensor& grad,
                      bool transposed, const Tensor& out) {
  const int64_t rows = own.size(0), D = own.size(1);
  const ScalarType wide = accumulator(own.scalar_type());
  const ScalarType type = common_type(grad.scalar_type(), other.scalar_type());
  const Tensor g = torch::stable::to(grad, type), factor = torch::stable::to(other, type);
  const bool direct = out.scalar_type() == wide;
  const Tensor product = direct ? out : device_empty(own, {rows, D}, wide);
  multiply(own, transposed ? whole(g).transposed() : whole(g), whole(factor), whole(product));
  const Tensor total = device_empty(own, {rows}, wide);
  if (transposed)
    launch("column_sums", queue, column_sums_kernel<T>, Grid{(rows + kThreads - 1) / kThreads}, kThreads, 0,
           StoredArray(grad), grad.size(0), rows, data_of<T>(total));
  else
    launch("row_sums", queue, row_sums_kernel<T>, warp_per_row(rows), kThreads, 0, StoredArray(grad), rows,
           grad.size(1), false, data_of<T>(total));
  launch("squared_gradient", queue, squared_gradient_kernel<T>, warp_per_row(rows), kThreads, 0,
         StoredArray(own), data_of<const T>(total), data_of<const T>(product), rows, D, StoredArray(out));
}

template <class T>
void manhattan_backward(Queue& queue, const Tensor& own, const Tensor& other, const Tensor& grad,
                        bool transposed, const Tensor& out) {
  const int64_t rows = own.size(0), D = own.size(1), C = grad.size(1);
  launch("manhattan_gradient", queue, manhattan_gradient_kernel<T>,
         Grid{((rows + kTile - 1) / kTile) * ((D + kTile - 1) / kTile)}, kThreads,
         2 * shared_bytes<T>(kDepth * kTile), StoredArray(own), StoredArray(other), StoredArray(grad), rows,
         other.size(0), D, transposed ? int64_t(1) : C, transposed ? C : int64_t(1), StoredArray(out));
}

std::tuple<Tensor, Tensor> inner_distance_backward(Tensor grad, Tensor x, Tensor weight,
                                                   std::optional<Tensor> labels, int64_t p, bool need_x,
                                                   bool need_weight) {
  check_distance_backward("inner_distance_backward", grad, x, weight, labels, p);
  Queue queue(x);
  const int64_t N = x.size(0), D = x.size(1), C = weight.size(0);
  Tensor dx = gradient_like(x, need_x, false), dw = gradient_like(weight, need_weight, labels || N == 0);
  if (N == 0 || D == 0) return {dx, dw};
  dispatch_accumulator(x.scalar_type(), [&]<class T>() {
    const auto run = p == 2 ? squared_backward<T> : manhattan_backward<T>;
    if (need_x) run(queue, x, weight, grad, false, dx);
    if (need_weight && !labels) run(queue, weight, x, grad, true, dw);
    if (need_weight && labels)
      launch("own_rows_gradient", queue, own_rows_gradient_kernel<T>, warp_per_row(N), kThreads, 0,
             StoredArray(grad), StoredArray(x), StoredArray(weight), data_of<const int64_t>(*labels), N, D, C,
             int(p), StoredArray(dw));
  });
  return {dx, dw};
}

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  m.impl("inner_distance", TORCH_BOX(&nf::inner_distance));
  m.impl("inner_distance_backward", TORCH_BOX(&nf::inner_distance_backward));
}
