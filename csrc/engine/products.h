// The ways to make the products of a step over the classes, S = X W^T, x_sum = E W and dW = E^T X: which shapes
// and devices each takes, how many bytes it holds, how long it takes. Torch-free and CUDA-free: `_C` answers for
// a GPU that is not at hand, and plan.h chooses by it at every launch. What makes the tiles is in cpu/head.h and
// cuda/products.
#pragma once

#include <cstdint>
#include <string_view>

#include "engine/rates.h"
#include "engine/row_state.h"
#include "engine/tiles.h"

namespace nf {

// What of a chunk lies in memory, and so in every wider way.
enum class Held { kNothing, kE, kScores };

// Of one step. `item`: bytes of the products' operands and of E; what is summed is at least float32 (wide).
struct ProductShape {
  int64_t batch, dim, classes;
  int64_t item;
  bool softmax = true;         // the term (terms.h) is the softmax's
  Held held = Held::kNothing;  // has to lie in memory

  constexpr int64_t wide() const { return item < 4 ? 4 : item; }
};

struct DeviceFacts {
  bool cuda;
  int64_t threads;          // of a CPU
  int64_t multiprocessors;  // of a GPU, as the rest
  int64_t shared_limit;     // bytes of shared memory that a block may have
  int64_t capability;       // 80 for compute capability 8.0
  const Rates* rates;
};

// cell N C + klass C + row N + fixed, whole numbers throughout, so that Python and C++ find the same.
struct Polynomial {
  int64_t cell, klass, row, fixed;

  constexpr __int128 at(int64_t batch, int64_t classes) const {
    return (__int128(cell) * batch + klass) * classes + __int128(row) * batch + fixed;
  }
  constexpr Polynomial operator+(const Polynomial& o) const {
    return {cell + o.cell, klass + o.klass, row + o.row, fixed + o.fixed};
  }
};

// What a run over the classes costs: once, and (the launches) in every chunk of classes.
struct Cost {
  double cell, klass;
  int launches;

  constexpr Cost operator+(const Cost& o) const {
    return {cell + o.cell, klass + o.klass, launches + o.launches};
  }
};

// Bytes beyond inputs and gradients, in parts of a byte. `fixed`: bounds, of which the least holds.
constexpr int64_t kParts = 4096;
constexpr int64_t kMostBytes = int64_t(1) << 62;

constexpr int64_t whole_bytes(__int128 parts) {
  const __int128 bytes = (parts + kParts - 1) / kParts;
  return bytes < kMostBytes ? int64_t(bytes) : kMostBytes;
}
constexpr __int128 least(const Polynomial* bounds, int count, int64_t batch, int64_t classes) {
  __int128 value = bounds[0].at(batch, classes);
  for (int k = 1; k < count; ++k)
    if (bounds[k].at(batch, classes) < value) value = bounds[k].at(batch, classes);
  return value;
}

struct Workspace {
  Polynomial fixed[2];
  int count;             // of them
  Polynomial per_class;  // of a chunk: row N + fixed
  int64_t stored;        // per cell of E, where E is kept beside the chunks

  // Without E kept.
  constexpr int64_t bytes(int64_t batch, int64_t classes, int64_t chunk) const {
    return whole_bytes(least(fixed, count, batch, classes) + per_class.at(batch, 0) * chunk);
  }
  // The most classes at once, without E kept, that `budget` bytes hold; 0: not one.
  constexpr int64_t most_chunk(int64_t batch, int64_t classes, int64_t budget) const {
    const __int128 left = __int128(budget) * kParts - least(fixed, count, batch, classes);
    const __int128 chunk = left < 0 ? 0 : left / per_class.at(batch, 0);
    return chunk < kMostBytes ? int64_t(chunk) : kMostBytes;
  }
};

// Why a product is not for a shape, a device, or not chosen by itself.
enum class Refusal {
  kNone,
  kDevice,
  kTerm,
  kHeld,
  kType,
  kAlignment,
  kColumns,
  kSharedMemory,
  kCapability,
  kUnmeasured
};

struct Product {
  const char* name;             // by which a choice travels
  const char* scores;           // what makes the scores, as nf.plan() calls it
  const char* weight_gradient;  // what makes dW
  HeadKernels kernels;
  bool cuda;
  bool softmax_only;              // until another term is worth its registers there
  int64_t least_item, most_item;  // bytes of operands
  bool aligned;                   // rows begin at multiples of 16 bytes
  int64_t most_columns;           // of a row; 0: any
  int64_t capability;
  int64_t (*shared)(const ProductShape&);  // bytes of a block; null: nothing to ask for
  Held leaves;                             // in memory; E may be kept for backward then
  const char* results;  // where it was measured on a device; null: not yet, and then only chosen by name
  Cost (*forward)(const ProductShape&, const DeviceFacts&);
  Cost (*backward)(const ProductShape&, const DeviceFacts&);
  Cost (*again)(const ProductShape&, const DeviceFacts&);  // unit weights and E once more, without E kept
  Workspace (*workspace)(const ProductShape&, const DeviceFacts&, int64_t slots);

  constexpr bool keeps_e() const { return leaves != Held::kNothing; }
  constexpr Refusal refusal(const ProductShape& shape, const DeviceFacts& device) const {
    if (cuda != device.cuda) return Refusal::kDevice;
    if (softmax_only && !shape.softmax) return Refusal::kTerm;
    if (leaves < shape.held) return Refusal::kHeld;
    if (shape.item < least_item || shape.item > most_item) return Refusal::kType;
    if (aligned && shape.dim * shape.item % 16 != 0) return Refusal::kAlignment;
    if (most_columns != 0 && shape.dim > most_columns) return Refusal::kColumns;
    if (device.capability < capability) return Refusal::kCapability;
    if (shared != nullptr && shared(shape) > device.shared_limit) return Refusal::kSharedMemory;
    return Refusal::kNone;
  }
  constexpr bool takes(const ProductShape& shape, const DeviceFacts& device) const {
    return refusal(shape, device) == Refusal::kNone;
  }
};

namespace products {

constexpr double larger(double a, double b) { return a > b ? a : b; }

// Floating-point operations of one cell of one product.
constexpr double flops(const ProductShape& s) { return 2.0 * double(s.dim); }

constexpr double library_rate(const ProductShape& s, const Rates& r) {
  return s.item == 2 ? r.library16.value : s.item == 4 ? r.library32.value : r.library64.value;
}

// A library's product hides the shorter of arithmetic and traffic of E behind the longer.
constexpr double library_cell(const ProductShape& s, const Rates& r, int64_t e_item) {
  return larger(flops(s) / library_rate(s, r), double(e_item) / r.bandwidth.value);
}

// Unit rows of W: read in its type, taken as wide; written as operands of the scores and (`copies`) of E.
constexpr Cost unit_rows(const ProductShape& s, const Rates& r, int copies) {
  return {0, double(s.dim * (s.wide() + copies * s.item)) / r.bandwidth.value, 1};
}
constexpr Cost operand(const ProductShape& s, const Rates& r) {  // W of one type, read once
  return {0, double(s.dim * s.item) / r.bandwidth.value, 0};
}

constexpr Cost library_scores(const ProductShape& s, const Rates& r) {
  const double exponentiate = double(s.wide() + s.item) / r.bandwidth.value + 1 / r.exponentials.value;
  return operand(s, r) + Cost{library_cell(s, r, s.wide()) + exponentiate, 0, 2};
}
constexpr Cost own_scores(const ProductShape& s, const Rates& r, double rate) {
  return operand(s, r) +
         Cost{flops(s) / rate + double(s.item) / r.bandwidth.value + 1 / r.exponentials.value, 0, 1};
}
constexpr Cost class_sums(const ProductShape& s, const Rates& r) {
  return operand(s, r) + Cost{library_cell(s, r, s.item), 0, 1};
}
constexpr Cost library_gradient(const ProductShape& s, const Rates& r) {
  const double product = double(s.dim * s.wide());
  return {library_cell(s, r, s.item), product / r.bandwidth.value + 3 * product / r.pass.value, 2};
}
constexpr Cost own_gradient(const ProductShape& s, const Rates& r, double rate) {
  return {flops(s) / rate + double(s.item) / r.epilogue.value,
          2 * double(s.dim * s.wide()) / r.epilogue.value, 1};
}

constexpr int copies_of(const ProductShape& s) { return s.item == 2 ? 2 : 1; }
constexpr double simt_rate(const ProductShape& s, const Rates& r) {
  return s.item == 4 ? r.simt32.value : r.simt64.value;
}

// CPU: a tile's W, E and dW stay in a core's cache; each is read or written once in memory, E twice.
constexpr Cost blas_pass(const ProductShape& s, const DeviceFacts& d, double products, double exponentials,
                         double weights) {
  const Rates& r = *d.rates;
  const double threads = double(d.threads), item = double(s.wide());
  return {products * flops(s) / (threads * library_rate(s, r)) +
              exponentials / (threads * r.exponentials.value) + item / r.bandwidth.value,
          weights * double(s.dim) * item / r.bandwidth.value, 0};
}
constexpr Cost blas_forward(const ProductShape& s, const DeviceFacts& d) { return blas_pass(s, d, 2, 1, 1); }
constexpr Cost blas_backward(const ProductShape& s, const DeviceFacts& d) { return blas_pass(s, d, 1, 0, 3); }
constexpr Cost blas_again(const ProductShape& s, const DeviceFacts& d) { return blas_pass(s, d, 1, 1, 0); }

constexpr Cost cublas_forward(const ProductShape& s, const DeviceFacts& d) {
  return unit_rows(s, *d.rates, copies_of(s)) + library_scores(s, *d.rates) + class_sums(s, *d.rates);
}
constexpr Cost cublas_backward(const ProductShape& s, const DeviceFacts& d) {
  return library_gradient(s, *d.rates);
}
constexpr Cost cublas_again(const ProductShape& s, const DeviceFacts& d) {
  return unit_rows(s, *d.rates, 1) + library_scores(s, *d.rates);
}

constexpr Cost simt_forward(const ProductShape& s, const DeviceFacts& d) {
  const Rates& r = *d.rates;
  return unit_rows(s, r, 1) + own_scores(s, r, simt_rate(s, r)) + class_sums(s, r);
}
constexpr Cost simt_backward(const ProductShape& s, const DeviceFacts& d) {
  return own_gradient(s, *d.rates, simt_rate(s, *d.rates));
}
constexpr Cost simt_again(const ProductShape& s, const DeviceFacts& d) {
  return unit_rows(s, *d.rates, 1) + own_scores(s, *d.rates, simt_rate(s, *d.rates));
}

constexpr Cost sm80_forward(const ProductShape& s, const DeviceFacts& d) {
  const Rates& r = *d.rates;
  return unit_rows(s, r, 2) + own_scores(s, r, r.sm80_scores.value) + class_sums(s, r);
}
constexpr Cost sm80_backward(const ProductShape& s, const DeviceFacts& d) {
  return own_gradient(s, *d.rates, d.rates->sm80_weight_gradient.value);
}
constexpr Cost sm80_again(const ProductShape& s, const DeviceFacts& d) {
  return unit_rows(s, *d.rates, 1) + own_scores(s, *d.rates, d.rates->sm80_scores.value);
}

// Two products a pass, and E nowhere in memory.
constexpr Cost sweep_pass(const ProductShape& s, const Rates& r, double rate) {
  return {2 * flops(s) / rate + 1 / r.exponentials.value, 0, 1};
}
constexpr Cost sweep_forward(const ProductShape& s, const DeviceFacts& d) {
  const Rates& r = *d.rates;
  return unit_rows(s, r, 2) + operand(s, r) + operand(s, r) + sweep_pass(s, r, r.sm80_single_sweep.value);
}
constexpr Cost sweep_backward(const ProductShape& s, const DeviceFacts& d) {
  const Rates& r = *d.rates;
  const Cost write{0, 2 * double(s.dim * s.wide()) / r.epilogue.value, 0};
  return unit_rows(s, r, 1) + operand(s, r) + sweep_pass(s, r, r.sm80_sweep_gradient.value) + write;
}
constexpr Cost nothing(const ProductShape&, const DeviceFacts&) { return {0, 0, 0}; }

// Bytes of a row's state, its slopes (row_state.h) and its gradients (cuda/device/backward_kernels.cuh), its
// counter, and what the single sweep's backward knows of it.
constexpr int64_t kRowBytes = (int(kRowFields) + int(kSlopeFields) + 7) * 8 + 4 + 16;

// `slots` threads take part.
constexpr Workspace blas_workspace(const ProductShape& s, const DeviceFacts&, int64_t slots) {
  const int64_t item = s.wide();
  // x_hat and its weighted copy, x_sum, an accumulator per thread; the rows' state; norms of W.
  const int64_t row = (3 + slots) * s.dim * item + kRowBytes + 16 * slots;
  // Per class of a tile and thread: unit weights, their gradient, and a column of scores.
  return {.fixed = {{0, kParts * item, kParts * row, 0}, {}},
          .count = 1,
          .per_class = {0, 0, kParts * slots * item, kParts * slots * 2 * s.dim * item},
          .stored = kParts * item};
}

// x_hat and its weighted copy, x_sum and the part added to it; the rows' state, before and after it is finished,
// and columns up to a multiple of 8; norms of W. Per class: unit weights and, for 16-bit operands, their copy or
// their gradient; a column of E and of scores; for every row `partial` parts of a byte of partial sums.
constexpr Workspace chunk_workspace(const ProductShape& s, int64_t scores, int64_t partial) {
  const int64_t column = s.item + scores;
  const int64_t row = 2 * s.dim * (s.item + s.wide()) + kRowBytes + 7 * column;
  const int64_t klass = s.dim * (s.item + s.wide()) + 8 * column;
  return {.fixed = {{0, kParts * s.wide(), kParts * row, 0}, {}},
          .count = 1,
          .per_class = {0, 0, kParts * column + partial, kParts * (klass + (partial > 0 ? 1 : 0))},
          .stored = 0};
}

// Partial sums of a row: a pair of float64 per stretch of classes, the shorter of the two products' (128), so that
// a budget says the same whichever of them is the faster. E replaces scores of its own size.
constexpr Workspace wide_workspace(const ProductShape& s, const DeviceFacts&, int64_t) {
  return chunk_workspace(s, s.item == s.wide() ? 0 : s.wide(), kParts * 16 / tiles::SimtScores<4>::kClasses);
}

// Partial sums of a row: a pair of every block that it has, and of the first pass its largest logit. A row has no
// more blocks than tiles of classes, nor more than fill the device some times over, as long as those are enough.
constexpr Workspace sm80_workspace(const ProductShape& s, const DeviceFacts& d, int64_t) {
  using Tiles = tiles::Sm80Scores;
  constexpr int64_t kPair = 20 * kParts, kColumns = 2 * Tiles::kWarpColumns;
  Workspace w = chunk_workspace(s, 0, 0);
  w.count = 2;
  w.fixed[1] = w.fixed[0] + Polynomial{kPair / (kColumns * Tiles::kMostTiles), 0, 2 * kPair,
                                       kPair * Tiles::kTile * Tiles::blocks(2, d.multiprocessors)};
  w.fixed[0] = w.fixed[0] + Polynomial{kPair / kColumns, 0, kPair, 0};
  return w;
}

constexpr Workspace sweep_workspace(const ProductShape& s, const DeviceFacts& d, int64_t) {
  const int64_t splits = tiles::sweep_splits(d.multiprocessors, s.dim, s.batch);
  // x_hat, weighted features, x_sum and its parts; the rows' state and partial sums; norms of W. Per class unit
  // weights in two types.
  const int64_t row = (8 + 4 * splits) * s.dim + kRowBytes + 16 * splits;
  return {.fixed = {{0, kParts * 4, kParts * row, 0}, {}},
          .count = 1,
          .per_class = {0, 0, 0, kParts * 4 * s.dim},
          .stored = 0};
}

constexpr int64_t sm80_scores_shared(const ProductShape& s) { return tiles::sm80_scores_shared(s.dim); }
constexpr int64_t sm80_gradient_shared(const ProductShape& s) {
  return tiles::sm80_weight_gradient_shared(s.dim);
}
constexpr int64_t sm80_sweep_shared(const ProductShape& s) { return tiles::sm80_single_sweep_shared(s.dim); }
constexpr int64_t simt_shared(const ProductShape& s) {
  return s.item == 4 ? tiles::simt_shared<4>(s.dim) : tiles::simt_shared<8>(s.dim);
}

}  // namespace products

// A new one is a file in cuda/products and a row here.
constexpr Product kProducts[] = {
    {.name = "blas",
     .scores = "blas",
     .weight_gradient = "blas",
     .kernels = kLibraryKernels,
     .cuda = false,
     .softmax_only = false,
     .least_item = 2,
     .most_item = 8,
     .aligned = false,
     .most_columns = 0,
     .capability = 0,
     .shared = nullptr,
     .leaves = Held::kScores,
     .results = results::kCpu,
     .forward = products::blas_forward,
     .backward = products::blas_backward,
     .again = products::blas_again,
     .workspace = products::blas_workspace},
    {.name = "cublas",
     .scores = "cublas",
     .weight_gradient = "cublas",
     .kernels = kLibraryKernels,
     .cuda = true,
     .softmax_only = false,
     .least_item = 2,
     .most_item = 8,
     .aligned = false,
     .most_columns = 0,
     .capability = 0,
     .shared = nullptr,
     .leaves = Held::kScores,
     .results = results::kH100Steps,
     .forward = products::cublas_forward,
     .backward = products::cublas_backward,
     .again = products::cublas_again,
     .workspace = products::wide_workspace},
    {.name = "simt",
     .scores = "cuda cores",
     .weight_gradient = "cuda cores",
     .kernels = kPlainProducts,
     .cuda = true,
     .softmax_only = true,
     .least_item = 4,
     .most_item = 8,
     .aligned = true,
     .most_columns = tiles::kSimtColumns,
     .capability = 0,
     .shared = products::simt_shared,
     .leaves = Held::kE,
     .results = results::kH100Steps,
     .forward = products::simt_forward,
     .backward = products::simt_backward,
     .again = products::simt_again,
     .workspace = products::wide_workspace},
    {.name = "sm80_scores",
     .scores = "tensor cores",
     .weight_gradient = "cublas",
     .kernels = kTensorCoreScores,
     .cuda = true,
     .softmax_only = false,
     .least_item = 2,
     .most_item = 2,
     .aligned = true,
     .most_columns = 0,
     .capability = 80,
     .shared = products::sm80_scores_shared,
     .leaves = Held::kE,
     .results = results::kH100,
     .forward = products::sm80_forward,
     .backward = products::cublas_backward,
     .again = products::sm80_again,
     .workspace = products::sm80_workspace},
    {.name = "sm80_weight_gradient",
     .scores = "tensor cores",
     .weight_gradient = "tensor cores",
     .kernels = kTensorCores,
     .cuda = true,
     .softmax_only = false,
     .least_item = 2,
     .most_item = 2,
     .aligned = true,
     .most_columns = tiles::kSm80GradientColumns,
     .capability = 80,
     .shared = products::sm80_gradient_shared,
     .leaves = Held::kE,
     .results = results::kH100,
     .forward = products::sm80_forward,
     .backward = products::sm80_backward,
     .again = products::sm80_again,
     .workspace = products::sm80_workspace},
    {.name = "sm80_single_sweep",
     .scores = "tensor cores",
     .weight_gradient = "tensor cores",
     .kernels = kSingleSweep,
     .cuda = true,
     .softmax_only = true,
     .least_item = 2,
     .most_item = 2,
     .aligned = true,
     .most_columns = tiles::kSm80SweepColumns,
     .capability = 80,
     .shared = products::sm80_sweep_shared,
     .leaves = Held::kNothing,
     .results = results::kH100,
     .forward = products::sweep_forward,
     .backward = products::sweep_backward,
     .again = products::nothing,
     .workspace = products::sweep_workspace},
};

}  // namespace nf
