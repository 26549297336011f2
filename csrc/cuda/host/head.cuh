// What the stages of the engine share on CUDA: shapes, the types of the operands, and a chunk of scores turned
// into coefficients.
//
// Operands. float32 and float64 stay what they are, whatever torch is told of TF32 (sm80_tf32x3.h splits them). With a 16-bit input the scores come from float16
// unit rows (their entries are bounded, so its 11 bits beat bfloat16's 8) and float32 sums; the coefficients E,
// which span e^-87 to e^88, are bfloat16 and meet bfloat16 unit rows.
//
// The scale is read on the device and nothing is read back, so the host never waits.
#pragma once

#include <optional>

#include "cuda/device/per_row.cuh"
#include "cuda/device/row_state.cuh"
#include "cuda/device/stored.cuh"
#include "cuda/device/term_rows.cuh"
#include "cuda/host/fold_scores.h"
#include "cuda/host/head_launch.h"
#include "cuda/host/rows.h"
#include "cuda/products/cublas.h"
#include "cuda/products/simt_products.h"
#include "cuda/products/sm80_scores.h"
#include "cuda/products/sm80_tf32x3.h"
#include "cuda/products/sm90_scores.h"
#include "engine/head_arguments.h"
#include "math/softmax.h"

namespace nf {
namespace {

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
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// One shift for all rows, where the term has a shift at all; else what any scale serves.
template <class T>
math::FixedShift window_of(const HeadInputs& in) {
  const bool softmax = dispatch_term<T>(in.term, []<class Term>() { return Term::kSoftmax; });
  return softmax ? math::fixed_shift_of<T>(double(in.total_classes), in.lowest, in.highest)
                 : math::FixedShift{INFINITY, 0.0, 0.0};
}

// Shapes and types shared by forward and backward.
template <class T>
struct Head {
  const HeadInputs& in;
  int64_t batch, dim, classes, chunk;
  math::FixedShift window;  // made here for the device too
  bool fixed_shift;         // known here and now; where the scale is a tensor, the device decides
  bool is_16_bit;           // 16-bit operands
  Makers makers;
  ScalarType wide;   // sums, scores
  ScalarType score;  // operands of the scores
  ScalarType other;  // E and the operands it meets

  Head(const HeadInputs& of, const HeadLaunch& launch)
      : in(of),
        batch(in.x.size(0)),
        dim(in.x.size(1)),
        classes(in.weight.size(0)),
        chunk(std::max<int64_t>(1, std::min(launch.chunk, classes))),
        window(window_of<T>(in)),
        fixed_shift(window.largest_scale == INFINITY || (!in.scale && window.serves(in.scale_value))),
        is_16_bit(is_16_bit_product(in)),
        makers(launch.makers),
        wide(accumulator(in.x.scalar_type())),
        score(is_16_bit ? ScalarType::Half : wide),
        other(is_16_bit ? ScalarType::BFloat16 : wide) {}

  // Scores that never reach memory.
  bool tensor_cores() const {
    return makers.scores == Maker::kSm80 || makers.scores == Maker::kSm90 || tf32();
  }
  bool tf32() const {
    return makers.scores == Maker::kTf32;
  }  // of float32 operands; the others are of 16 bits
  // kappa from scores would need them in memory.
  bool plain_products() const { return makers.scores == Maker::kSimt && fixed_shift; }
  bool single_sweep() const { return makers.at_once; }
  // dW leaves its kernel finished: its product never reaches memory.
  bool own_gradient() const {
    return makers.gradient == Maker::kSimt ? fixed_shift : makers.gradient != Maker::kLibrary;
  }

  Chunk at(int64_t first) const { return {first, std::min(chunk, classes - first)}; }
  Chunk largest_chunk() const { return {0, chunk}; }
  // The most that f says of a chunk, 0 where there is none: all are as wide, but for the last.
  template <class F>
  int64_t most_of_chunks(const F& f) const {
    return classes > 0 ? std::max<int64_t>(f(at(0)), f(at((classes - 1) / chunk * chunk))) : 0;
  }

  Tensor buffer(int64_t rows, int64_t columns, ScalarType type) const {
    return device_empty(in.x, {rows, columns}, type);
  }

  TermRows term_rows(const double* shift, const double* threshold) const {
    return {in.term,   data_of<const int64_t>(in.labels), RowNumbers(in.scale, in.scale_value), shift,
            threshold, data_or_null<double>(in.numbers)};
  }

  // Unit rows of a chunk's classes: as score operands, and (where `copy` holds anything) as partners of E;
  // the inverse norms as well.
  UnitRows unit_weights(const Chunk& of, const Array& w_hat, const Array& copy, const Array* inverse) const {
    const char* rows = static_cast<const char*>(in.weight.const_data_ptr());
    UnitRows task{rows + of.first * dim * int64_t(in.weight.element_size()),
                  in.weight.scalar_type(),
                  of.width,
                  dim,
                  2,
                  in.eps};
    task.y = data_of<void>(w_hat);
    task.y_type = score;
    task.copy = data_of<void>(copy);
    if (inverse != nullptr) task.inverse = data_of<T>(*inverse) + of.first;
    return task;
  }

  // scores = x_hat w_hat^T of some classes.
  void make_scores(const Chunk& of, const Array& x_hat, const Array& w_hat, const Array& scores) const {
    multiply(in.x, {x_hat.data(), score, batch, dim, dim},
             Matrix{w_hat.data(), score, of.width, dim, dim}.transposed(),
             {scores.data(), wide, batch, of.width, of.stride()});
  }

  // What a chunk adds to x_sum, before it is added.
  int64_t part_cells(const Queue& queue) const {
    const int64_t parts =
        tf32() ? most_of_chunks([&](const Chunk& of) { return tf32_sum_splits(queue, batch, dim, of.width); })
               : int64_t(chunk < classes);
    return parts * batch * dim;
  }

  // Of the partial sums that `coefficients` leaves.
  int64_t splits(const Queue& queue, const Chunk& of) const {
    return makers.scores == Maker::kSm90 ? sm90_score_splits(queue, batch, of.width)
           : tf32()                      ? tf32_score_splits(queue, batch, of.width)
           : tensor_cores()              ? score_splits(queue, batch, dim, of.width)
           : plain_products()            ? plain_splits<T>(of.width)
                                         : fold_splits(of.width, in.centers);
  }

  // E of some classes into `e`, unless that is empty, and its sums. Those of cuBLAS have been made already.
  void coefficients(Queue& queue, const Chunk& of, const Array& x_hat, const Array& w_hat,
                    const Array& scores, const TermRows& rows, const SweepSums& sums, const Array& e) const {
    if constexpr (std::is_same_v<T, float>) {
      const auto fold = [&]<class Task>(void (*run)(Queue&, const Task&)) {
        Task task = score_task<Task>(of, x_hat, w_hat, rows, sums);
        task.e = data_of<typename Task::Stored>(e);
        run(queue, task);
      };
      if (tf32()) return fold(tf32_score_fold);
      if (tensor_cores()) return fold(makers.scores == Maker::kSm90 ? sm90_score_fold : score_fold);
    }
    if (plain_products())
      return plain_scores<T>(queue, {data_of<const T>(x_hat), data_of<const T>(w_hat), batch, dim, of.width,
                                     of.first, rows, sums, data_of<T>(e), of.stride()});
    fold_scores<T>(queue, {data_of<const T>(scores), batch, of.width, of.stride(), of.first, in.centers, rows,
                           sums, data_of<void>(e), is_16_bit});
  }

  template <class Task>
  Task score_task(const Chunk& of, const Array& x_hat, const Array& w_hat, const TermRows& rows,
                  const SweepSums& sums) const {
    using Factor = typename Task::Factor;
    return {data_of<const Factor>(x_hat),
            data_of<const Factor>(w_hat),
            batch,
            dim,
            of.width,
            of.first,
            window,
            rows,
            sums,
            nullptr,
            of.stride(),
            nullptr};
  }
};

}  // namespace
}  // namespace nf
