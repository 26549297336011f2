// The products of tiles with the features: scores, x_sum and dW. By pairs of bfloat16 (pairs.h) where features and
// weight are that in storage, row by row of usual norms; by the library, of unit rows made in float, everywhere
// else. Which of them costs no accuracy: pairs multiply the stored rows exactly.
#pragma once

#include <cmath>

#include "cpu/head.h"
#include "engine/product_costs.h"

namespace nf::cpu {

// Rows as operands of pairs: each scaled by a power of two to a norm in [1, 2), and what makes it a unit row then.
class PairedRows {
 public:
  // `factor` times the unit row, from a row and 1 / ||.|| of it, or 0 for one that is taken as zero; false if it has
  // to be left to float.
  bool add(const void* row, float inverse, float factor = 1) {
    if (inverse == 0) {
      rows_.push_back({nullptr, 0});
      factors_.push_back(0);
      return true;
    }
    const float norm = 1 / inverse;
    if (!math::norm_is_moderate(norm)) return false;
    const int exponent = std::ilogb(norm);
    rows_.push_back({static_cast<const BFloat16*>(row), exponent});
    factors_.push_back(std::ldexp(inverse, exponent) * factor);
    return true;
  }
  int64_t count() const { return int64_t(rows_.size()); }
  const PairRow* rows() const { return rows_.data(); }
  const float* factors() const { return factors_.data(); }

 private:
  std::vector<PairRow> rows_;
  std::vector<float> factors_;
};

// Null where the library makes the products. Narrow rows, tiles and batches are not worth packing.
inline const PairKernels* pairs_for(const HeadShape& shape, const Tensor& x, const Tensor& weight) {
  constexpr int64_t kLeastRows = 8, kLeastColumns = 32, kLeastTile = 48;
  const bool stored = x.scalar_type() == ScalarType::BFloat16 && weight.scalar_type() == ScalarType::BFloat16;
  const bool wide = shape.batch >= kLeastRows && shape.dim >= kLeastColumns && shape.chunk >= kLeastTile;
  return stored && wide && products::pairs_pay(kCpuRates) ? row_table().pairs : nullptr;
}

// Scores and x_sum. A thread's tile at a time: `begin`, then products with it.
template <class T>
class TileProducts {
 public:
  TileProducts(Block& scratch, const HeadShape& shape, const Tensor& x, const Tensor& weight, T eps)
      : shape_(shape),
        x_(x, shape.dim),
        w_(weight, shape.dim),
        eps_(eps),
        kernels_(pairs_for(shape, x, weight)),
        tiles_(size_t(shape.slots)) {
    // A tile's operands by pairs take less than its unit rows, and leave room for one of those.
    units_ = scratch.array<T>(shape.slots * shape.chunk * shape.dim);
    packed_ = scratch.array<int>(kernels_ != nullptr ? kernels_->room_of_rows(shape.batch, shape.dim) : 0);
  }

  // The unit rows of the features times factor_of(i), and inverse_of(i) = 1 / ||x_i||, 0 for a row that was made zero.
  // Scratch has its memory by now.
  template <class Inverse, class Factor>
  void take_features(T* x_hat, const Inverse& inverse_of, const Factor& factor_of) {
    x_hat_ = x_hat;
    for (int64_t i = 0; kernels_ != nullptr && i < shape_.batch; ++i)
      if (!features_.add(x_.row(i), float(inverse_of(i)), float(factor_of(i)))) kernels_ = nullptr;
    if (kernels_ != nullptr)
      kernels_->pack_rows(features_.rows(), shape_.batch, shape_.dim, packed_features());
  }

  // The tile's rows and, into inverse[r], 1 / ||.|| of its r-th.
  void begin(int64_t slot, const Tile& tile, T* inverse) {
    Held& held = tiles_[size_t(slot)];
    if (kernels_ != nullptr)
      for (int64_t r = 0; r < tile.width; ++r)
        inverse[r] =
            w_.kernel.normalize_wide(w_.row(tile.first + r), shape_.dim, 2, eps_, spare_row(slot)).inverse();
    held = {tile, inverse, {}, false, {}};
    if (!pair(held)) unit_rows(w_, tile, eps_, units(slot), inverse);
  }
  // The same of known inverse norms.
  void begin_again(int64_t slot, const Tile& tile, const T* inverse) {
    Held& held = tiles_[size_t(slot)];
    held = {tile, inverse, {}, false, {}};
    if (pair(held)) return;
    for (int64_t r = 0; r < tile.width; ++r)
      unit_row_again(w_, tile.first + r, inverse[r], eps_, units(slot) + tile.column(r) * shape_.dim);
  }

  // S of the tile, [N, width].
  void scores(int64_t slot, const Matrix<T>& out) const {
    const Held& held = tiles_[size_t(slot)];
    if (!held.paired) return score_tile(shape_, x_hat_, units(slot), held.tile, out);
    if constexpr (std::is_same_v<T, float>) {
      const int64_t D = shape_.dim;
      kernels_->pack_across(held.rows.rows(), held.rows.count(), D, packed_tile(slot));
      kernels_->rows_by_rows(packed_features(), features_.factors(), shape_.batch, packed_tile(slot),
                             held.rows.factors(), held.rows.count(), D, out.data, out.row_stride);
    }
  }

  // sum [N, D] += e w_hat, e [N, width]. Of a softmax `sums` [N] are those of E over this tile and others: an error
  // in what is below kMuch of its row's sum is lost in the row's gradient.
  void add_weighted(int64_t slot, const Matrix<T>& e, const double* sums, T* sum) {
    Held& held = tiles_[size_t(slot)];
    const int64_t N = shape_.batch, D = shape_.dim, width = held.tile.width;
    if (!held.paired) return multiply<T>(e, {units(slot), width, D, D}, {sum, N, D, D}, true);
    if constexpr (std::is_same_v<T, float>) {
      held.limits.resize(size_t(sums != nullptr ? N : 0));
      for (size_t i = 0; i < held.limits.size(); ++i) held.limits[i] = float(kMuch * sums[i]);
      kernels_->pack_down(held.rows.rows(), width, D, packed_tile(slot));
      kernels_->add_weighted_rows(e.data, e.row_stride, held.rows.factors(),
                                  sums != nullptr ? held.limits.data() : nullptr, N, width, packed_tile(slot),
                                  D, sum);
    }
  }

  // Unit row r of the tile; the next one may take its place.
  T* unit_row(int64_t slot, int64_t r) const {
    const Held& held = tiles_[size_t(slot)];
    if (!held.paired) return units(slot) + held.tile.column(r) * shape_.dim;
    unit_row_again(w_, held.tile.first + r, held.inverse[r], eps_, spare_row(slot));
    return spare_row(slot);
  }

  // A row of scratch, for when the tile's products are made.
  T* spare_row(int64_t slot) const { return units(slot) + (shape_.chunk - 1) * shape_.dim; }

 private:
  static constexpr double kMuch = 0x1p-6;

  struct Held {
    Tile tile;
    const T* inverse;
    PairedRows rows;  // in the order of the tile's columns
    bool paired;
    std::vector<float> limits;
  };

  bool pair(Held& held) const {
    if (kernels_ == nullptr) return false;
    const Tile& tile = held.tile;
    for (int64_t k = 0; k < tile.centers; ++k)
      for (int64_t r = k; r < tile.width; r += tile.centers)
        if (!held.rows.add(w_.row(tile.first + r), float(held.inverse[r]))) return false;
    return held.paired = true;
  }

  T* units(int64_t slot) const { return data_of<T>(units_) + slot * shape_.chunk * shape_.dim; }
  uint32_t* packed_tile(int64_t slot) const { return reinterpret_cast<uint32_t*>(units(slot)); }
  uint32_t* packed_features() const { return reinterpret_cast<uint32_t*>(data_of<int>(packed_)); }

  const HeadShape& shape_;
  Rows<T> x_, w_;
  T eps_;
  const PairKernels* kernels_;
  std::vector<Held> tiles_;
  Array units_, packed_;
  PairedRows features_;
  T* x_hat_ = nullptr;
};

// The product of dW: a tile's coefficients, transposed, with the features times a factor of every row.
template <class T>
class GradientProduct {
 public:
  GradientProduct(Block& scratch, const HeadShape& shape, const Tensor& x, const Tensor& weight, bool wanted)
      : shape_(shape), x_(x, shape.dim), kernels_(pairs_for(shape, x, weight)) {
    // The features packed take half of it.
    weighted_ = scratch.array<T>(wanted ? shape.batch * shape.dim : 0);
  }

  // As TileProducts, and what weight each row has.
  template <class Inverse, class Factor, class Weight>
  void take_features(const T* x_hat, const Inverse& inverse_of, const Factor& factor_of,
                     const Weight& weight_of) {
    const int64_t N = shape_.batch, D = shape_.dim;
    PairedRows features;
    for (int64_t i = 0; kernels_ != nullptr && i < N; ++i)
      if (!features.add(x_.row(i), float(inverse_of(i)), float(factor_of(i)))) kernels_ = nullptr;
    T* weighted = data_of<T>(weighted_);
    if (kernels_ == nullptr) {
      for_rows(N, D, [&](int64_t i) {
        for (int64_t d = 0; d < D; ++d) weighted[i * D + d] = T(weight_of(i)) * x_hat[i * D + d];
      });
      return;
    }
    kernels_->pack_down(features.rows(), N, D, packed());
    factors_.assign(features.factors(), features.factors() + N);
    for (int64_t i = 0; i < N; ++i) factors_[size_t(i)] *= float(weight_of(i));
  }

  // out [width, D] = e^T times the weighted features, e [N, width].
  void operator()(const Matrix<T>& e, T* out) const {
    const int64_t N = shape_.batch, D = shape_.dim;
    if (kernels_ == nullptr)
      return multiply<T>(e.transposed(), {data_of<T>(weighted_), N, D, D}, {out, e.columns, D, D});
    if constexpr (std::is_same_v<T, float>)
      kernels_->weighted_sums(e.data, e.row_stride, factors_.data(), N, e.columns, packed(), D, out);
  }

 private:
  uint32_t* packed() const { return reinterpret_cast<uint32_t*>(data_of<T>(weighted_)); }

  const HeadShape& shape_;
  Rows<T> x_;
  const PairKernels* kernels_;
  Array weighted_;
  std::vector<float> factors_;  // of rows packed
};

}  // namespace nf::cpu
