// Rows held by one warp, some at a time: the first kHeld vectors that a lane has of each stay in registers, so what
// fits there is read from memory once, and all of it is under way before anything is done with it.
//
// A card hides the latency of its memory behind bytes that are under way: 3 TB/s times 0.7 us are 16 KB for each
// multiprocessor of an H100. Warps with 64 registers find room there 32 at a time, so 1 KB of each is plenty: long
// rows one by one, short ones together. Whatever of a row is read twice costs memory twice: between the passes of
// all these warps lie more bytes than the caches have.
#pragma once

#include "cuda/device/reduce.cuh"
#include "cuda/device/stored.cuh"
#include "math/normalize.h"

namespace nf {

// What is moved of kVec values at a time: at most 16 bytes.
template <int kVec, class S>
constexpr int kPieceOf = kVec * sizeof(S) > 16 ? int(16 / sizeof(S)) : kVec;

template <int kVec, class S>
NF_DEVICE Vector<S, kVec> load_pieces(const S* from) {
  constexpr int kPiece = kPieceOf<kVec, S>;
  Vector<S, kVec> whole;
#pragma unroll
  for (int at = 0; at < kVec; at += kPiece) {
    const Vector<S, kPiece> piece = load_vector<kPiece>(from + at);
#pragma unroll
    for (int e = 0; e < kPiece; ++e) whole.at[at + e] = piece.at[e];
  }
  return whole;
}

// How a warp takes rows: kRows at once, in vectors of kVec values, of which a lane holds kHeld of each row. What is
// kLonger than that is read again when it is needed again.
template <int kVec_, int kHeld_, int kRows_, bool kLonger_>
struct RowShape {
  static constexpr int kVec = kVec_, kHeld = kHeld_, kRows = kRows_, kStep = kWarp * kVec;
  static constexpr bool kLonger = kLonger_;
};

// f.template operator()<Shape>() for rows of this length, which are `aligned` if kVec divides it and rows begin at
// multiples of 16 bytes.
template <int kVec, class F>
void dispatch_rows(bool aligned, int64_t length, const F& f) {
  constexpr int64_t kStep = kWarp * kVec;
  if (!aligned) return f.template operator()<RowShape<1, 4, 1, true>>();
  if constexpr (kVec > 2)  // short rows without idle lanes; four of doubles would find no registers
    if (length <= kStep / 2) return f.template operator()<RowShape<kVec / 2, 1, 4, false>>();
  if (length <= kStep) return f.template operator()<RowShape<kVec, 1, 2, false>>();
  if (length <= 2 * kStep) return f.template operator()<RowShape<kVec, 2, 1, false>>();
  if (length <= 4 * kStep) return f.template operator()<RowShape<kVec, 4, 1, false>>();
  return f.template operator()<RowShape<kVec, 8, 1, true>>();
}

// Blocks of kThreads to a multiprocessor: the registers for kOperands rows of a shape, and as many again.
template <class Shape, int kThreads, int kOperands>
constexpr int kResidentOf = (Shape::kVec > 1 && Shape::kHeld * kOperands > 8   ? 512
                             : Shape::kVec > 1 && Shape::kHeld * kOperands > 4 ? 768
                                                                               : 1024) /
                            kThreads;

// Where rows of a warp begin, and how many of them there are.
template <class Shape>
struct WarpPlace {
  int64_t first;
  int count;  // of Shape::kRows; not positive behind the end

  NF_DEVICE WarpPlace(int64_t at, int64_t end)
      : first(at), count(int(end - at < Shape::kRows ? end - at : Shape::kRows)) {}
  NF_DEVICE bool has(int r) const { return r < count; }
};

template <class S, class Shape>
class WarpRows {
 public:
  static constexpr int kVec = Shape::kVec, kHeld = Shape::kHeld, kRows = Shape::kRows;
  using Held = Vector<S, kVec>;

  // Rows at `rows`, of a length that kVec divides.
  NF_DEVICE WarpRows(const S* rows, int64_t length, const WarpPlace<Shape>& place)
      : rows_(rows + lane_id() * kVec), length_(length), count_(place.count) {
    const int64_t left = length - lane_id() * kVec;
    vectors_ = int(left > 0 ? (left + Shape::kStep - 1) / Shape::kStep : 0);
    read();
  }

  // From memory, again.
  NF_DEVICE void read() {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int k = 0; k < kHeld; ++k)
        if (holds(r, k)) held_[r][k] = load(r, k);
  }

  // f(position, vector) for each vector that this lane has of row r.
  template <class F>
  NF_DEVICE void each(int r, const F& f) const {
    each_with(r, *this, [&](int64_t at, const Held& v, const Held&) { f(at, v); });
  }

  // f(position, vector, other's vector): rows as long as these, perhaps of another type.
  template <class Other, class F>
  NF_DEVICE void each_with(int r, const Other& other, const F& f) const {
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if (holds(r, k)) f(position(k), as_stored(held_[r][k]), as_stored(other.held_[r][k]));
    if constexpr (Shape::kLonger)
#pragma unroll 1
      for (int k = kHeld; k < vectors_; ++k) f(position(k), load(r, k), other.load(r, k));
  }

  // sum of f(value) over row r, read from memory: for what is seldom needed. All lanes. 0 of a row that is none.
  template <class F>
  NF_DEVICE accum_t<S> sum_from_memory(int r, const F& f) const {
    accum_t<S> total = 0;
    const int vectors = r < count_ ? vectors_ : 0;
#pragma unroll 1  // its registers matter, not its speed
    for (int64_t k = 0; k < vectors; ++k)
#pragma unroll 1
      for (int e = 0; e < kVec; ++e) total += f(accum_t<S>(rows_[r * length_ + k * Shape::kStep + e]));
    return warp_sum(total);
  }

 private:
  template <class, class>
  friend class WarpRows;

  NF_DEVICE bool holds(int r, int k) const { return (kRows == 1 || r < count_) && k < vectors_; }
  NF_DEVICE int64_t position(int k) const { return lane_id() * kVec + int64_t(k) * Shape::kStep; }
  NF_DEVICE Held load(int r, int k) const {
    return load_pieces<kVec>(rows_ + r * length_ + int64_t(k) * Shape::kStep);
  }

  const S* rows_;  // this lane's first vector
  int64_t length_;
  int count_;
  int vectors_;  // how many the lane has of a row: one number, where a position each would cost registers
  Held held_[kRows][kHeld];
};

// A gradient that stays finite in float16 where eps rules the norm; see math::ruled_by_eps.
template <class S, class T>
NF_DEVICE T held_finite(T d, T norm, T eps, int p) {
  if constexpr (std::is_same_v<S, Half>) {
    if (math::ruled_by_eps(p, norm, eps)) return d > T(65504) ? T(65504) : d < T(-65504) ? T(-65504) : d;
  }
  return d;
}

}  // namespace nf
