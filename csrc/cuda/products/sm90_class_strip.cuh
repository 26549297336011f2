// What follows the product in sm90_weight_gradient.cu: from the sums in a warp's registers, and rows of W in shared
// memory, to rows of dW in their place. The formulas are those of class_gradient.cuh.
//
// A strip is what a warp has of its warpgroup's tile (warpgroup.cuh): 16 classes, and of class 8 h + lane / 4 the
// columns 8 j + lane % 4 * 2 + {0, 1}, at g[4 j + 2 h + {0, 1}].
#pragma once

#include <device/tensor_map.cuh>

#include "cuda/device/class_gradient.cuh"

namespace nf {
namespace {

constexpr int kStrip = 16;

NF_DEVICE int strip_class(int h) { return 8 * h + lane_id() / 4; }

// Rows of W lie in boxes of 128 bytes. With floats, neighbouring rows meet in the same banks, since eight columns take
// two of a row's 16-byte chunks: odd rows take pair j ^ 2 where even ones take pair j, and then all are different.
template <class S>
constexpr int kTurned = sizeof(S) == 4 ? 2 : 0;

template <class S, int kValues>
NF_DEVICE void turn_strip(float (&g)[kValues]) {
  if constexpr (kTurned<S> != 0) {
    const bool odd = lane_id() / 4 % 2 != 0;
#pragma unroll
    for (int j = 0; j < kValues / 4; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if ((j & kTurned<S>) == 0) {
          float &low = g[4 * j + k], &high = g[4 * (j + kTurned<S>)+k];
          const float was = low;
          low = odd ? high : was;
          high = odd ? was : high;
        }
  }
}

// Of the lane's j-th pair in a turned strip: 8 j and what is the same for all j (all that turn one way).
template <class S>
NF_DEVICE int strip_offset(int j) {
  const int turn = lane_id() / 4 % 2 * 8 * kTurned<S>;
  return lane_id() % 4 * 2 + ((j & kTurned<S>) != 0 ? -turn : turn);
}
template <class S>
NF_DEVICE int strip_column(int j) {
  return 8 * j + strip_offset<S>(j);
}

// The same pair's place in boxes of a strip's rows (tensor_map.cuh), box_bytes from one box to the next. One of the
// lane's pairs is 16 * k bytes from the first exclusive-or'ed with what is the lane's own.
template <class S>
class StripRows {
 public:
  NF_DEVICE StripRows(char* rows, int box_bytes)
      : rows_(rows + lane_id() / 4 * kBoxBytes),
        box_bytes_(box_bytes),
        own_(int(strip_column<S>(0) * sizeof(S)) ^ lane_id() / 4 * 16) {}

  NF_DEVICE S* pair(int j, int h) const {
    const int byte = 8 * int(sizeof(S)) * j;
    return reinterpret_cast<S*>(rows_ + byte / kBoxBytes * box_bytes_ + 8 * h * kBoxBytes +
                                (byte % kBoxBytes ^ own_));
  }

 private:
  char* rows_;  // the lane's first
  int box_bytes_, own_;
};

// dW of a turned strip's classes, from column `first_column` on, in the place of W. One warp. `over_columns(h, sum)`:
// the sum over all columns of what the lane's four have in common.
template <class S, int kValues, class OverColumns>
NF_DEVICE void finish_strip(const ClassGradient& task, int64_t first, int first_column, float (&g)[kValues],
                            const StripRows<S>& rows, const OverColumns& over_columns) {
  constexpr int kPairs = kValues / 4;
  math::RowScale<float> scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) scale[h] = quad_scale(task, first + strip_class(h));

  if (task.uniform != nullptr) {
    const float* uniform = static_cast<const float*>(task.uniform) + first_column;
    const float* weights = static_cast<const float*>(task.class_weights);
    // Sums of constants and of two numbers of the lane: a pointer for each pair would take a register for each.
    const float* const from[] = {uniform + strip_offset<S>(0), uniform + strip_offset<S>(kTurned<S>)};
    const int left[] = {int(task.dim) - first_column - strip_offset<S>(0),
                        int(task.dim) - first_column - strip_offset<S>(kTurned<S>)};
    float of_class[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t within = first + strip_class(h);
      of_class[h] = weights != nullptr && within < task.width ? weights[task.first + within] : 1.0f;
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int turned = (j & kTurned<S>) != 0;
      if (8 * j >= left[turned]) continue;
      const auto add = load_vector<2>(from[turned] + 8 * j);
#pragma unroll
      for (int k = 0; k < 4; ++k) g[4 * j + k] += of_class[k / 2] * add.at[k % 2];
    }
  }

  float radial[2] = {};
#pragma unroll
  for (int j = 0; j < kPairs; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto w = load_vector<2>(rows.pair(j, h));
#pragma unroll
      for (int e = 0; e < 2; ++e)
        radial[h] += float(w.at[e]) * scale[h].outer * scale[h].inner * g[4 * j + 2 * h + e];
    }
  over_columns(radial);

#pragma unroll
  for (int j = 0; j < kPairs; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto w = load_vector<2>(rows.pair(j, h));
      Vector<S, 2> out;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        out.at[e] = weight_gradient_at(g[4 * j + 2 * h + e], w.at[e], radial[h], scale[h], float(task.eps));
      store_vector(rows.pair(j, h), out);
    }
}

}  // namespace
}  // namespace nf
