// What the stages of the engine share on the CPU: the rows' state, what a row says to its term, and a tile of
// cosines turned into coefficients.
//
// A tile of cosines is one BLAS call, is turned into coefficients in place while it is in cache, and feeds the
// product that adds up x_sum. Stored coefficients lie tile by tile: those of the tile at class f start at N * f,
// row-major [N, width]. Behind them stands how wide a tile is: it was chosen by the number of threads, which may
// be another by the time of backward.
#pragma once

#include "cpu/head.h"
#include "engine/head_arguments.h"
#include "engine/row_state.h"
#include "engine/terms.h"
#include "math/softmax.h"

namespace nf::cpu {

// table[field][i] of row_state.h, Field being RowField or SlopeField.
template <class Field>
struct RowTableOf {
  double* data;
  int64_t batch;

  RowTableOf(const Array& table, int64_t rows) : data(data_of<double>(table)), batch(rows) {}
  explicit RowTableOf(const Tensor& t)
      : data(static_cast<double*>(const_cast<void*>(t.const_data_ptr()))), batch(t.size(1)) {}
  double* operator[](Field field) const { return data + field * batch; }
};
using RowState = RowTableOf<RowField>;
using RowSlopes = RowTableOf<SlopeField>;

// A number of every row: a float argument, or the tensor [] or [N] given in its place.
class RowNumbers {
 public:
  RowNumbers(const std::optional<Tensor>& t, double value) {
    if (!t || t->dim() == 0) {
      value_ = number_argument(t, value);
      return;
    }
    rows_.resize(size_t(t->size(0)));
    if (t->scalar_type() == ScalarType::Double) {
      std::copy_n(static_cast<const double*>(t->const_data_ptr()), rows_.size(), rows_.data());
    } else {
      std::vector<float> wide(rows_.size());
      stored_rows<float>(t->scalar_type())
          .widen(t->const_data_ptr(), int64_t(rows_.size()), 1.0f, wide.data());
      std::copy(wide.begin(), wide.end(), rows_.begin());
    }
  }
  double operator[](int64_t i) const { return rows_.empty() ? value_ : rows_[size_t(i)]; }

 private:
  double value_ = 0;
  std::vector<double> rows_;
};

// What every row says to its term. A row that does not count says nothing of its own: its cosines are 0, and so
// must be what the term makes of them.
template <class T>
struct RowTerms {
  typename AccumRows<T>::Fold fold;
  typename AccumRows<T>::Largest largest;
  const double* numbers;  // [kNumbers of the term] or null
  std::vector<math::TermRow<T>> rows;

  template <class Counts, class Shift>
  RowTerms(const HeadInputs& in, const RowNumbers& scale, const Counts& counts, const Shift& shift)
      : fold(accum_rows<T>().fold[in.term]),
        largest(accum_rows<T>().largest[in.term]),
        numbers(in.numbers ? data_of<const double>(*in.numbers) : nullptr),
        rows(size_t(in.x.size(0))) {
    const double* threshold = in.threshold ? data_of<const double>(*in.threshold) : nullptr;
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto at = int64_t(i);
      const bool own = counts(at);
      rows[i] = {T(scale[at]), T(own ? shift(at) : 0.0), T(own && threshold != nullptr ? threshold[i] : 0.0)};
    }
  }
};

// A row of a tile by its classes: what stands there, or the nearest of every class's centres.
template <class T>
class PooledRow {
 public:
  explicit PooledRow(const Tile& tile)
      : tile_(tile), memory_(size_t(tile.centers > 1 ? 2 * tile.classes() : 0)) {}

  // Cosines [classes], which may be overwritten.
  T* of(T* row) {
    if (tile_.centers == 1) return row;
    T *best = memory_.data(), *cells = best + tile_.classes();
    accum_rows<T>().pool(row, tile_.classes(), tile_.centers, best);
    return std::copy_n(best, tile_.classes(), cells) - tile_.classes();
  }
  // What has become of them, back to the centres that won.
  void give_back(T* row) {
    if (tile_.centers == 1) return;
    const T *best = memory_.data(), *cells = best + tile_.classes();
    accum_rows<T>().spread(row, tile_.classes(), tile_.centers, best, cells);
  }

 private:
  Tile tile_;
  std::vector<T> memory_;
};

// Cosines -> coefficients in place; put(i, sums) receives those of a row's part of this tile. The target's
// coefficient is 0: its term is added apart, in the accumulator's precision and with its margin.
template <class T, class Put>
void fold_tile(const Labels& labels, const RowTerms<T>& terms, const Tile& tile, T* scores, const Put& put) {
  PooledRow<T> pooled(tile);
  for (int64_t i = 0; i < labels.batch; ++i) {
    T *row = scores + i * tile.width, *cells = pooled.of(row);
    around_target(labels.data[i], tile, [&](int64_t begin, int64_t end) {
      put(i, terms.fold(cells + begin, end - begin, terms.rows[size_t(i)], terms.numbers));
    });
    const int64_t target = tile.class_of(labels.data[i]);
    if (target >= 0) cells[target] = T(0);
    pooled.give_back(row);
  }
}

// Constant factors of the classes, all 1 unless given.
template <class T>
struct ClassWeights {
  bool given;
  const T* data;  // [C]; null in an empty shard too

  explicit ClassWeights(const std::optional<Tensor>& t)
      : given(t.has_value()), data(given ? static_cast<const T*>(t->const_data_ptr()) : nullptr) {}
  double operator[](int64_t j) const { return given ? double(data[j]) : 1.0; }
};

}  // namespace nf::cpu
