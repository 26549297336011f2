// The end of every kernel that makes gradients of class weights: from sum_i others_i E_ij x_hat_i, held in
// registers, to dW in its final type, written once. Adds the targets and what smoothing gives to every
// class, takes out the radial part, divides by the norm.
#pragma once

#include <device/shared_memory.cuh>

#include "cuda/device/reduce.cuh"
#include "cuda/device/row_scale.cuh"
#include "engine/row_state.h"
#include "engine/tiles.h"
#include "math/normalize.h"

namespace nf {

// Of every chunk of kHotRows rows, the classes that own more than kFewTargets of them and the sums over those rows,
// where somebody has made them (hot_targets.cuh).
constexpr int kHotRows = kWarp * kWarp, kFewTargets = 8, kHotSlots = kHotRows / (kFewTargets + 1);
struct HotTargets {
  int* counts = nullptr;      // [chunks]: of the slots that hold a class
  int64_t* labels = nullptr;  // [chunks, kHotSlots]
  int* rows = nullptr;        // [chunks, kHotSlots]: how many they own
  double* sums = nullptr;     // [chunks, kHotSlots, dim]
};

struct ClassGradient {
  StoredArray x;          // [batch, dim]
  const int64_t* labels;  // [batch]
  int64_t batch;
  int64_t dim;
  const double* target;         // [batch]: d loss / d target cosine, 0 for rows that do not count
  const double *outer, *inner;  // [batch]: x_hat = x * outer * inner
  StoredArray weight;           // [C, dim]
  const void* inverse;          // [C], accumulator type
  int64_t first;                // the classes [first, first + width) are wanted
  int64_t width;
  const void* uniform;        // [dim], accumulator type, or null
  const void* class_weights;  // [C], accumulator type, or null
  double eps;
  StoredArray dw;  // [C, dim], type of weight; or only the rows of the classes from dw_first on
  int64_t dw_first;
  bool vectors;  // four values of weight and of dw may be moved at once
  HotTargets hot;
};

namespace {

using tiles::kRoundRows;

// How a block's warps hold its tile [kClasses, columns]: kDown warps along the classes, kAcross along the
// columns. A warp has kRounds * kRoundRows classes; of every eight a lane has row lane / 4, and columns
// 8 p + lane % 4 * 2 + {0, 1}, p < kPairs: the fragments of products on tensor cores.
template <class T, int kDown_, int kAcross_, int kRounds_, int kPairs_>
struct HeldTile : tiles::Held<kDown_, kAcross_, kRounds_, kPairs_> {
  static constexpr int kThreads = kDown_ * kAcross_ * kWarp;
};

// g[d] += target_i x_hat_di for the rows of the class, in their order. One warp; its earlier accesses to g are over.
//
// Rows are looked through kHotRows at a time, and what is found there is summed in double before it meets
// g: a class may own the whole batch, and a float sum over all of it would drift. Double, too, is what
// x / ||x|| needs before the target's slope, since that slope over a large norm is no float.
template <class T>
NF_DEVICE void add_targets(const ClassGradient& task, int64_t label, int count, T* g) {
  for (int64_t base = 0; count > 0; base += kHotRows) {
    if (task.hot.counts != nullptr) {
      const int64_t chunk = base / kHotRows, first = chunk * kHotSlots;
      const int slots = task.hot.counts[chunk];
      int64_t found = -1;
      for (int k = 0; k < slots && found < 0; k += kWarp) {
        const int slot = k + lane_id();
        const unsigned own = warp_ballot(slot < slots && task.hot.labels[first + slot] == label);
        if (own != 0) found = first + k + lowest_bit(own);
      }
      if (found >= 0) {
        const double* sum = task.hot.sums + found * task.dim;
#pragma unroll 1
        for (int64_t d = lane_id(); d < task.dim; d += kWarp) g[d] = T(double(g[d]) + sum[d]);
        count -= task.hot.rows[found];
        continue;
      }
    }
    unsigned hits = 0;  // lane k: those among the k-th kWarp rows
#pragma unroll 1
    for (int k = 0; k < kWarp && base + k * kWarp < task.batch; ++k) {
      const int64_t i = base + k * kWarp + lane_id();
      const unsigned found = warp_ballot(i < task.batch && task.labels[i] == label && task.target[i] != 0.0);
      if (lane_id() == k) hits = found;
    }
    const unsigned groups = warp_ballot(hits != 0);
    if (groups == 0) continue;
    int found = 0;
    task.x.visit<T>([&](const auto* x) {
#pragma unroll 1
      for (int64_t first = 0; first < task.dim; first += kWarp) {
        const int64_t d = first + lane_id();
        double sum = 0;
        found = 0;
#pragma unroll 1
        for (unsigned of = groups; of != 0; of &= of - 1) {
          const int k = lowest_bit(of);
#pragma unroll 1
          for (unsigned left = shuffle(hits, k); left != 0; left &= left - 1, ++found) {
            const int64_t i = base + k * kWarp + lowest_bit(left);
            if (d < task.dim)
              sum += task.target[i] * (double(x[i * task.dim + d]) * task.outer[i] * task.inner[i]);
          }
        }
        if (d < task.dim) g[d] = T(double(g[d]) + sum);
      }
    });
    count -= found;
  }
  sync_warp();  // these sums, before other lanes read them
}

// The gradient of a class's unit row from its product and its targets: with what smoothing gives to every class.
template <class T>
struct UnitGradient {
  const T* uniform;  // [dim] or null
  T weight;

  NF_DEVICE UnitGradient(const ClassGradient& task, int64_t j)
      : uniform(static_cast<const T*>(task.uniform)),
        weight(task.class_weights != nullptr ? static_cast<const T*>(task.class_weights)[j] : T(1)) {}
  NF_DEVICE T operator()(T g, int64_t d) const {
    return g + (uniform != nullptr ? weight * uniform[d] : T(0));
  }
};

// dW at one place of a row, from the gradient of its unit row there.
template <class S, class T>
NF_DEVICE S weight_gradient_at(T g, S w, T radial, const math::RowScale<T>& scale, T eps) {
  const T y = T(w) * scale.outer * scale.inner;
  const T dw = math::normalize_vjp<T>(g, y, radial, scale.outer, scale.inner, T(0));
  return S(held_finite<S>(dw, scale.norm, eps, 2));
}

// dW of one class from g, in shared memory. One warp; kVec divides dim.
template <int kVec, class T, class S>
NF_DEVICE void write_class(const ClassGradient& task, const S* weight, const math::RowScale<T>& scale,
                           int64_t j, const T* g) {
  const UnitGradient<T> gradient(task, j);
  T radial = 0;
#pragma unroll 1  // a few rounds: one body is enough, in each of many copies of this code
  for (int64_t d = lane_id() * kVec; d < task.dim; d += kWarp * kVec) {
    const auto w = load_vector<kVec>(weight + j * task.dim + d);
    for (int e = 0; e < kVec; ++e)
      radial += T(w.at[e]) * scale.outer * scale.inner * gradient(g[d + e], d + e);
  }
  radial = warp_sum(radial);
#pragma unroll 1
  for (int64_t d = lane_id() * kVec; d < task.dim; d += kWarp * kVec) {
    const auto w = load_vector<kVec>(weight + j * task.dim + d);
    Vector<S, kVec> out;
    for (int e = 0; e < kVec; ++e)
      out.at[e] = weight_gradient_at(gradient(g[d + e], d + e), w.at[e], radial, scale, T(task.eps));
    store_vector_global<kVec>(static_cast<S*>(task.dw.data) + (j - task.dw_first) * task.dim + d, out);
  }
}

// dW of the class first + within, whose product is g, in shared memory. One warp.
template <class T>
NF_DEVICE void finish_class(const ClassGradient& task, int64_t within, int targets, T* g) {
  const int64_t j = task.first + within;
  if (targets > 0) add_targets(task, j, targets, g);
  const math::RowScale<T> scale =
      scale_again(task.weight, j, task.dim, T(task.eps), static_cast<const T*>(task.inverse)[j]);
  task.weight.visit<T>([&](const auto* weight) {
    if (sizeof(*weight) < 8 && task.vectors)  // doubles fill a warp's access one by one
      write_class<sizeof(*weight) < 8 ? 4 : 1>(task, weight, scale, j, g);
    else
      write_class<1>(task, weight, scale, j, g);
  });
}

// How the class `place` of the task was scaled, whose quad of lanes has it; the whole warp comes.
NF_DEVICE math::RowScale<float> quad_scale(const ClassGradient& task, int64_t place) {
  const bool exists = place < task.width;
  const int64_t j = task.first + place;
  const float inverse = exists ? static_cast<const float*>(task.inverse)[j] : 1.0f;
  math::RowScale<float> scale{inverse, 1.0f, 1.0f / inverse};
  // Rows of extreme norms are summed anew, by all lanes.
  for (unsigned left = warp_ballot(lane_id() % 4 == 0 && !math::inverse_serves(inverse)); left != 0;
       left &= left - 1) {
    const int of = lowest_bit(left);
    const auto again =
        scale_again(task.weight, shuffle(j, of), task.dim, float(task.eps), shuffle(inverse, of));
    if (lane_id() / 4 == of / 4) scale = again;
  }
  return scale;
}

// One more of counts[c] if row i, of this label, has class c of the `classes` from `tile` on as its target.
NF_DEVICE void count_target(const ClassGradient& task, int64_t tile, int64_t classes, int64_t i,
                            int64_t label, int* counts) {
  const int64_t place = target_place(label, task.first + tile, classes);
  if (place >= 0 && task.target[i] != 0.0) atomic_add(counts + place, 1);
}

// counts[c] = rows whose target is class c of those. All threads of the block, which read kAtOnce labels at a time.
template <int kThreads, int kAtOnce>
NF_DEVICE void count_targets(const ClassGradient& task, int64_t tile, int64_t classes, int* counts) {
  for (int c = thread_id(); c < classes; c += kThreads) counts[c] = 0;
  sync_block();  // the zeros, before anyone counts
  for (int64_t first = thread_id(); first < task.batch; first += kThreads * kAtOnce) {
    int64_t labels[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t i = first + u * kThreads;
      labels[u] = i < task.batch ? task.labels[i] : kElsewhere;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      count_target(task, tile, classes, first + u * kThreads, labels[u], counts);
  }
  sync_block();  // the counts, before they are read
}

// `value(r, p, k)`: what this lane has of row r * kRoundRows + lane / 4 of its warp, k-th of pair p. All
// threads of the block take part; `scratch` is kScratch and `counts` kClasses long, and both may have been
// something else before.
template <class Tile, class T, class Value>
NF_DEVICE void finish_class_gradient(const ClassGradient& task, int64_t tile, const Value& value, T* scratch,
                                     int* counts) {
  sync_block();  // whatever scratch and counts were before
  count_targets<Tile::kThreads, 1>(task, tile, Tile::kClasses, counts);

  const int down = warp_id() / Tile::kAcross, across = warp_id() % Tile::kAcross;
  T* mine = scratch + down * kRoundRows * Tile::kStride;
  const auto sync = [] {
    if constexpr (Tile::kAcross > 1)
      sync_block();
    else
      sync_warp();
  };
#pragma unroll
  for (int round = 0; round < Tile::kRounds; ++round) {
    if (round > 0) sync();  // the last round's reads, before these writes
#pragma unroll
    for (int p = 0; p < Tile::kPairs; ++p)
      store_vector<2>(
          mine + lane_id() / 4 * Tile::kStride + (across * Tile::kPairs + p) * 8 + lane_id() % 4 * 2,
          Vector<T, 2>{{value(round, p, 0), value(round, p, 1)}});
    sync();  // the writes above, before the rows are read
    for (int row = across; row < kRoundRows; row += Tile::kAcross) {
      const int place = down * Tile::kWarpClasses + round * kRoundRows + row;
      if (tile + place >= task.width) continue;  // the whole warp
      finish_class(task, tile + place, counts[place], mine + row * Tile::kStride);
    }
  }
}

}  // namespace
}  // namespace nf
