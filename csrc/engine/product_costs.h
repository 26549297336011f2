// Seconds, bytes and shared memory of the products: what the rows of products.h are made of.
#pragma once

#include "engine/product.h"

namespace nf {
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
// Arithmetic, traffic of E and exponentials go on side by side.
constexpr Cost overlapped_scores(const ProductShape& s, const Rates& r, double rate) {
  return operand(s, r) +
         Cost{larger(larger(flops(s) / rate, double(s.item) / r.bandwidth.value), 1 / r.exponentials.value),
              0, 1};
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

// Where features and weight are bfloat16: scores take one product of pairs, sums with E two, for its 16 bits.
constexpr bool pairs_pay(const Rates& r) { return r.pairs16.value >= 2 * r.library32.value; }

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

constexpr Cost sm90_scores_forward(const ProductShape& s, const DeviceFacts& d) {
  const Rates& r = *d.rates;
  return unit_rows(s, r, 2) + overlapped_scores(s, r, r.sm90_scores.value) + class_sums(s, r);
}
constexpr Cost sm90_scores_again(const ProductShape& s, const DeviceFacts& d) {
  return unit_rows(s, *d.rates, 1) + overlapped_scores(s, *d.rates, d.rates->sm90_scores.value);
}

// Arithmetic, E and what a block reads of the weighted features, once for each of its
// tiles (or its cluster's), run beside each other.
constexpr Cost sm90_backward(const ProductShape& s, const DeviceFacts& d) {
  const Rates& r = *d.rates;
  const double reads = double(s.dim * s.item) / tiles::dispatch_sm90_gradient(s.dim, [&]<class S>() {
                         return double(S::kClasses * S::kCluster);
                       });
  const double product = larger(flops(s) / r.sm90_weight_gradient.value, reads / r.cache_bandwidth.value);
  return {larger(product, double(s.item) / r.bandwidth.value),
          2 * double(s.dim * s.wide()) / r.bandwidth.value, 1};
}

constexpr Cost tf32_forward(const ProductShape& s, const DeviceFacts& d) {
  const Rates& r = *d.rates;
  const Cost sums{flops(s) / r.tf32x3_sums.value, 0, 2};
  return unit_rows(s, r, 1) + own_scores(s, r, r.tf32x3_scores.value) + operand(s, r) + sums;
}
constexpr Cost tf32_backward(const ProductShape& s, const DeviceFacts& d) {
  return own_gradient(s, *d.rates, d.rates->tf32x3_gradient.value);
}
constexpr Cost tf32_again(const ProductShape& s, const DeviceFacts& d) {
  return unit_rows(s, *d.rates, 1) + own_scores(s, *d.rates, d.rates->tf32x3_scores.value);
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
// By wgmma exponentials hide behind the products, and so does the reading of W, of which E's columns are made again
// while the next ones are multiplied.
constexpr Cost overlapped_pass(const ProductShape& s, const Rates& r, double rate) {
  return {larger(2 * flops(s) / rate, 1 / r.exponentials.value), 0, 1};
}
constexpr Cost sm90_sweep_forward(const ProductShape& s, const DeviceFacts& d) {
  const Rates& r = *d.rates;
  const Cost adds_splits{0, 0, 1};
  return unit_rows(s, r, 2) + overlapped_pass(s, r, r.sm90_single_sweep.value) + adds_splits;
}
constexpr Cost sm90_sweep_backward(const ProductShape& s, const DeviceFacts& d) {
  const Rates& r = *d.rates;
  const Cost finish{0, 2 * double(s.dim * s.wide()) / r.bandwidth.value, 0};  // W read and dW written
  return unit_rows(s, r, 1) + overlapped_pass(s, r, r.sm90_sweep_gradient.value) + finish;
}
constexpr Cost nothing(const ProductShape&, const DeviceFacts&) { return {0, 0, 0}; }

// Bytes of a row's state, its slopes (row_state.h) and its gradients (cuda/device/backward_kernels.cuh), its
// threshold, its counter, and what the single sweep's backward knows of it.
constexpr int64_t kRowBytes = (int(kRowFields) + int(kSlopeFields) + 8 + 1) * 8 + 4 + 16;

// On CUDA: the sums over the targets of classes that own more than eight of some 1024 rows, in float64, and whose
// they are (cuda/device/hot_targets.cuh).
constexpr int64_t hot_bytes(const ProductShape& s) { return s.dim + 2; }

// `slots` threads take part.
constexpr Workspace blas_workspace(const ProductShape& s, const DeviceFacts&, int64_t slots) {
  const int64_t item = s.wide();
  // x_hat and its weighted copy, x_sum, an accumulator per thread; the rows' state, and every thread's sums and
  // largest cosine; norms of W.
  const int64_t row = (3 + slots) * s.dim * item + kRowBytes + 32 * slots;
  // Per class of a tile and thread: unit weights, their gradient, and a column of scores; of several centres a row's
  // cosines and coefficients by class as well.
  const int64_t klass = 2 * s.dim * item + (s.centers > 1 ? item : 0);
  return {.fixed = {{0, kParts * item, kParts * row, 0}, {}},
          .count = 1,
          .per_class = {0, 0, kParts * slots * item, kParts * slots * klass},
          .stored = kParts * item};
}

// x_hat and its weighted copy, x_sum and the part added to it; the rows' state, before and after it is finished,
// and columns up to a multiple of 8; norms of W. Per class: unit weights and, for 16-bit operands, their copy or
// their gradient; a column of E and of scores; for every row `partial` parts of a byte of partial sums.
constexpr Workspace chunk_workspace(const ProductShape& s, int64_t scores, int64_t partial) {
  const int64_t column = s.item + scores;
  const int64_t row = 2 * s.dim * (s.item + s.wide()) + kRowBytes + hot_bytes(s) + 7 * column;
  const int64_t klass = s.dim * (s.item + s.wide()) + 8 * column;
  return {.fixed = {{0, kParts * s.wide(), kParts * row, 0}, {}},
          .count = 1,
          .per_class = {0, 0, kParts * column + partial, kParts * (klass + (partial > 0 ? 1 : 0))},
          .stored = 0};
}

// Partial sums of a row: a pair of float64, and its largest cosine where that is wanted, per stretch of classes,
// the shorter of the two products' (128), so that a budget says the same whichever of them is the faster. E
// replaces scores of its own size.
constexpr Workspace wide_workspace(const ProductShape& s, const DeviceFacts&, int64_t) {
  return chunk_workspace(s, s.item == s.wide() ? 0 : s.wide(), kParts * 24 / tiles::SimtScores<4>::kClasses);
}

// Partial sums of a row: a pair of every block that it has, perhaps its largest cosine, and of the first pass its
// largest logit. A row has no more blocks than tiles of classes, nor more than fill the device some times over, as
// long as those are enough.
template <class Tiles>
constexpr Workspace split_workspace(const ProductShape& s, int64_t columns, int64_t blocks) {
  constexpr int64_t kPartial = 28 * kParts;
  Workspace w = chunk_workspace(s, 0, 0);
  w.count = 2;
  w.fixed[1] = w.fixed[0] + Polynomial{kPartial / (columns * Tiles::kMostTiles), 0, 2 * kPartial,
                                       kPartial * Tiles::kTile * blocks};
  w.fixed[0] = w.fixed[0] + Polynomial{kPartial / columns, 0, kPartial, 0};
  return w;
}
constexpr Workspace sm80_workspace(const ProductShape& s, const DeviceFacts& d, int64_t) {
  using Tiles = tiles::Sm80Scores;
  return split_workspace<Tiles>(s, 2 * Tiles::kWarpColumns, Tiles::blocks(2, d.multiprocessors));
}
constexpr Workspace sm90_scores_workspace(const ProductShape& s, const DeviceFacts& d, int64_t) {
  using Tiles = tiles::Sm90Scores;
  return split_workspace<Tiles>(s, Tiles::kClasses, Tiles::kMostRounds * d.multiprocessors);
}

// Partial sums of a row as of sm80_workspace, at most one for each tile of classes; and those of x_sum, of so many
// stretches as the classes have or fill the device.
constexpr Workspace tf32_workspace(const ProductShape& s, const DeviceFacts& d, int64_t) {
  using Sums = tiles::Sm80Tf32Sums;
  Workspace w = chunk_workspace(s, 0, kParts * 28 / tiles::Sm80Tf32Scores::kClasses);
  w.count = 2;
  w.fixed[1] =
      w.fixed[0] +
      Polynomial{0, 0, 0, kParts * 4 * Sums::kRows * Sums::kColumns * Sums::blocks(d.multiprocessors)};
  w.fixed[0] = w.fixed[0] + Polynomial{kParts * 4 * s.dim / Sums::kLeastStretch, 0, 0, 0};
  return w;
}

constexpr Workspace single_sweep_workspace(const ProductShape& s, int64_t splits) {
  // x_hat, weighted features, x_sum and its parts; the rows' state and partial sums; norms of W. Per class unit
  // weights in two types.
  const int64_t row = (8 + 4 * splits) * s.dim + kRowBytes + hot_bytes(s) + 16 * splits;
  return {.fixed = {{0, kParts * 4, kParts * row, 0}, {}},
          .count = 1,
          .per_class = {0, 0, 0, kParts * 4 * s.dim},
          .stored = 0};
}
constexpr Workspace sweep_workspace(const ProductShape& s, const DeviceFacts& d, int64_t) {
  return single_sweep_workspace(s, tiles::sweep_splits(d.multiprocessors, s.dim, s.batch));
}
constexpr Workspace sm90_sweep_workspace(const ProductShape& s, const DeviceFacts& d, int64_t) {
  return single_sweep_workspace(s, tiles::sm90_sweep_splits(d.multiprocessors, s.batch));
}

constexpr int64_t sm80_scores_shared(const ProductShape& s) { return tiles::sm80_scores_shared(s.dim); }
constexpr int64_t sm80_gradient_shared(const ProductShape& s) {
  return tiles::sm80_weight_gradient_shared(s.dim);
}
constexpr int64_t sm90_scores_shared(const ProductShape& s) { return tiles::sm90_scores_shared(s.dim); }
constexpr int64_t sm90_gradient_shared(const ProductShape& s) {
  return tiles::sm90_weight_gradient_shared(s.dim);
}
constexpr int64_t sm80_sweep_shared(const ProductShape& s) { return tiles::sm80_single_sweep_shared(s.dim); }
constexpr int64_t sm90_sweep_shared(const ProductShape& s) { return tiles::sm90_single_sweep_shared(s.dim); }
constexpr int64_t tf32_shared(const ProductShape& s) { return tiles::sm80_tf32x3_shared(s.dim); }
constexpr int64_t simt_shared(const ProductShape& s) {
  return s.item == 4 ? tiles::simt_shared<4>(s.dim) : tiles::simt_shared<8>(s.dim);
}

}  // namespace products

}  // namespace nf
