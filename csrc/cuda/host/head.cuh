// What the stages of the fused head share on CUDA: shapes, and the types its operands have.
//
// Operands. float32 and float64 stay what they are. With a 16-bit input the scores come from float16
// unit rows (their entries are bounded, so its 11 bits beat bfloat16's 8) and float32 sums; E, which
// spans e^-87 to e^88, is bfloat16 and meets bfloat16 unit rows.
//
// The scale is read on the device and nothing is read back, so the host never waits.
#pragma once

#include <optional>

#include "cuda/device/reduce.cuh"
#include "cuda/device/row_access.cuh"
#include "cuda/device/row_state.cuh"
#include "cuda/device/stored.cuh"
#include "cuda/host/head_launch.h"
#include "cuda/host/rows.h"
#include "cuda/products/cublas.h"
#include "cuda/products/simt_products.h"
#include "cuda/products/sm80_scores.h"
#include "engine/head_arguments.h"
#include "math/softmax.h"

namespace nf {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;

Grid warp_per_row(int64_t rows) { return {(rows + kRowsPerBlock - 1) / kRowsPerBlock}; }

// Constant factors of the rows or of the classes, all 1 unless given.
template <class T>
struct Factors {
  bool given;
  const T* data;  // [N] or [C]; null in an empty shard too

  explicit Factors(const std::optional<Tensor>& t)
      : given(t.has_value()), data(given ? static_cast<const T*>(t->const_data_ptr()) : nullptr) {}
  NF_DEVICE double operator[](int64_t i) const { return given ? double(data[i]) : 1.0; }
};

template <class T>
T* data_or_null(const Tensor& t) {
  return t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Shapes, types and buffers shared by forward and backward.
template <class T>
struct Head {
  const Tensor& x;
  const Tensor& weight;
  const Tensor& labels;
  RowNumbers scale;
  Factors<T> class_weight;
  int64_t batch, dim, classes, total_classes, chunk;
  bool is_shard;            // one shard of the classes
  math::FixedShift window;  // made here for the device too
  bool fixed_shift;         // known here and now; where the scale is a tensor, the device decides
  bool is_16_bit;           // 16-bit operands
  HeadKernels kernels;
  ScalarType wide;   // sums, scores
  ScalarType score;  // operands of the scores
  ScalarType other;  // E and the operands it meets

  Head(const HeadInputs& in, const HeadLaunch& launch)
      : x(in.x),
        weight(in.weight),
        labels(in.labels),
        scale(in.scale, in.scale_value),
        class_weight(in.class_weight),
        batch(x.size(0)),
        dim(x.size(1)),
        classes(weight.size(0)),
        total_classes(in.total_classes),
        chunk(std::max<int64_t>(1, std::min(launch.chunk, classes))),
        is_shard(in.is_shard),
        window(math::fixed_shift_of<T>(double(in.total_classes))),
        fixed_shift(!in.scale && window.serves(in.scale_value)),
        is_16_bit(in.product_precision == ScalarType::Half || in.product_precision == ScalarType::BFloat16),
        kernels(launch.kernels),
        wide(accumulator(x.scalar_type())),
        score(is_16_bit ? ScalarType::Half : wide),
        other(is_16_bit ? ScalarType::BFloat16 : wide) {}

  bool tensor_cores() const { return kernels != kLibraryKernels && kernels != kPlainProducts; }
  // kappa from scores would need them in memory.
  bool plain_products() const { return kernels == kPlainProducts && fixed_shift; }
  bool single_sweep() const { return kernels == kSingleSweep; }

  const int64_t* label_data() const { return static_cast<const int64_t*>(labels.const_data_ptr()); }

  // Rows of scores and of E begin at multiples of 16 bytes whatever C is.
  static int64_t padded(int64_t width) { return (width + 7) / 8 * 8; }

  Tensor buffer(int64_t rows, int64_t columns, ScalarType type) const {
    return device_empty(x, {rows, columns}, type);
  }

  // Unit rows of the classes [first, first + width): as score operands, and (with `copy`) as partners
  // of E; the inverse norms as well.
  UnitRows unit_weights(int64_t first, int64_t width, double eps, const Tensor& w_hat, const Tensor* copy,
                        const Tensor* inverse) const {
    const char* rows = static_cast<const char*>(weight.const_data_ptr());
    UnitRows task{
        rows + first * dim * int64_t(weight.element_size()), weight.scalar_type(), width, dim, 2, eps};
    task.y = w_hat.mutable_data_ptr();
    task.y_type = score;
    if (copy != nullptr) task.copy = copy->mutable_data_ptr();
    if (inverse != nullptr) task.inverse = static_cast<T*>(inverse->mutable_data_ptr()) + first;
    return task;
  }

  // scores = x_hat w_hat^T of some classes.
  void make_scores(int64_t width, const Tensor& x_hat, const Tensor& w_hat, const Tensor& scores) const {
    multiply(x, {x_hat.const_data_ptr(), score, batch, dim, dim},
             Matrix{w_hat.const_data_ptr(), score, width, dim, dim}.transposed(),
             {scores.const_data_ptr(), wide, batch, width, padded(width)});
  }

  PlainScores<T> plain_scores_task(int64_t first, int64_t width, const Tensor& x_hat, const Tensor& w_hat,
                                   const double* shift, const RowState& rows, const Tensor& e) const {
    return {static_cast<const T*>(x_hat.const_data_ptr()),
            static_cast<const T*>(w_hat.const_data_ptr()),
            batch,
            dim,
            width,
            first,
            label_data(),
            scale,
            shift,
            rows,
            static_cast<T*>(e.mutable_data_ptr()),
            padded(width),
            nullptr,
            nullptr};
  }

  ScoreExp score_exp_task(int64_t first, int64_t width, const Tensor& x_hat, const Tensor& w_hat,
                          const double* shift, const RowState& rows, const Tensor* e) const {
    return {static_cast<const Half*>(x_hat.const_data_ptr()),
            static_cast<const Half*>(w_hat.const_data_ptr()),
            batch,
            dim,
            width,
            first,
            window.largest_scale,
            label_data(),
            scale,
            shift,
            rows,
            e != nullptr && e->numel() > 0 ? static_cast<BFloat16*>(e->mutable_data_ptr()) : nullptr,
            padded(width),
            nullptr,
            nullptr,
            nullptr};
  }
};

}  // namespace
}  // namespace nf
