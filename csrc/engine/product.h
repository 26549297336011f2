// What is said of one way to make the products of a step over the classes, S = X W^T, x_sum = E W and dW = E^T X:
// which shapes and devices it takes, how many bytes it holds, how long it takes. Torch-free and CUDA-free.
#pragma once

#include <cstdint>
#include <string_view>

#include "engine/rates.h"
#include "engine/row_state.h"
#include "engine/tiles_sm90.h"

namespace nf {

// What of a chunk lies in memory, and so in every wider way.
enum class Held { kNothing, kE, kScores };

// Of one step. `item`: bytes of the products' operands and of E; what is summed is at least float32 (wide).
struct ProductShape {
  int64_t batch, dim, classes;
  int64_t item;
  bool softmax = true;         // the term (terms.h) is the softmax's
  Held held = Held::kNothing;  // has to lie in memory
  int64_t centers = 1;         // of a class: `classes` and chunks of them are rows of W, whole classes

  constexpr int64_t wide() const { return item < 4 ? 4 : item; }
};

struct DeviceFacts {
  bool cuda;
  int64_t threads;          // of a CPU
  int64_t multiprocessors;  // of a GPU, as the rest
  int64_t shared_limit;     // bytes of shared memory that a block may have
  int64_t capability;       // 80 for compute capability 8.0
  const Rates* rates;
  bool wgmma = cuda && capability == 90;  // sm_90a's instructions, which no other architecture has
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
  kCenters,
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
  Makers makers;
  bool cuda;
  bool softmax_only;              // until another term is worth its registers there
  int64_t least_item, most_item;  // bytes of operands
  bool aligned;                   // rows begin at multiples of 16 bytes
  int64_t most_columns;           // of a row; 0: any
  int64_t capability;
  bool wgmma;                              // needs sm_90a
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
    if (leaves < Held::kScores && shape.centers > 1) return Refusal::kCenters;
    if (shape.item < least_item || shape.item > most_item) return Refusal::kType;
    if (aligned && shape.dim * shape.item % 16 != 0) return Refusal::kAlignment;
    if (most_columns != 0 && shape.dim > most_columns) return Refusal::kColumns;
    if (device.capability < capability || (wgmma && !device.wgmma)) return Refusal::kCapability;
    if (shared != nullptr && shared(shape) > device.shared_limit) return Refusal::kSharedMemory;
    return Refusal::kNone;
  }
  constexpr bool takes(const ProductShape& shape, const DeviceFacts& device) const {
    return refusal(shape, device) == Refusal::kNone;
  }
};

}  // namespace nf
