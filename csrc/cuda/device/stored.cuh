// Element types in memory. Hot kernels know theirs at compile time (S below); a tensor whose type only
// matters once per row is read and written through StoredArray, which switches on it.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <device/launch.cuh>
#include <device/vector.cuh>

#include "checks.h"
#include "engine/accumulator.h"
#include "engine/block.h"
#include "math/host_device.h"

namespace nf {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

template <class S>
using accum_t = math::accum_t<S>;

struct StoredArray {
  void* data;
  int type;  // ScalarType

  explicit StoredArray(const Tensor& t)
      : data(const_cast<void*>(t.const_data_ptr())), type(int(t.scalar_type())) {}
  explicit StoredArray(const Array& a) : data(a.data()), type(int(a.type())) {}
  StoredArray() : data(nullptr), type(0) {}

  template <class T>
  NF_DEVICE T load(int64_t i) const {
    switch (ScalarType(type)) {
      case ScalarType::Half:
        return T(float(static_cast<const Half*>(data)[i]));
      case ScalarType::BFloat16:
        return T(float(static_cast<const BFloat16*>(data)[i]));
      case ScalarType::Double:
        return T(static_cast<const double*>(data)[i]);
      default:
        return T(static_cast<const float*>(data)[i]);
    }
  }

  // f(pointer of the stored type): for loops, where a switch per element would cost. T is what is computed
  // in; nothing is stored wider.
  template <class T, class F>
  NF_DEVICE void visit(const F& f) const {
    switch (ScalarType(type)) {
      case ScalarType::Half:
        return f(static_cast<const Half*>(data));
      case ScalarType::BFloat16:
        return f(static_cast<const BFloat16*>(data));
      case ScalarType::Float:
        return f(static_cast<const float*>(data));
      default:
        if constexpr (std::is_same_v<T, double>) f(static_cast<const double*>(data));
    }
  }

  template <class T>
  NF_DEVICE void store(int64_t i, T value) const {
    switch (ScalarType(type)) {
      case ScalarType::Half:
        static_cast<Half*>(data)[i] = Half(float(value));
        break;
      case ScalarType::BFloat16:
        static_cast<BFloat16*>(data)[i] = BFloat16(float(value));
        break;
      case ScalarType::Double:
        static_cast<double*>(data)[i] = double(value);
        break;
      default:
        static_cast<float*>(data)[i] = float(value);
    }
  }
};

// The scale: a float argument, or a 0-d tensor that is read where it lies, so that no one waits for it.
struct Scale {
  StoredArray tensor;
  double number;

  Scale(const std::optional<Tensor>& t, double value) : number(value) {
    if (t) tensor = StoredArray(*t);
  }
  NF_DEVICE double value() const { return tensor.data != nullptr ? tensor.load<double>(0) : number; }
};

// A number of every row: a float argument, or a tensor [] or [N] that is read where it lies.
struct RowNumbers : Scale {
  bool per_row;

  RowNumbers(const std::optional<Tensor>& t, double value) : Scale(t, value), per_row(t && t->dim() == 1) {}
  NF_DEVICE double at(int64_t i) const { return per_row ? tensor.load<double>(i) : value(); }
};

// Elements a thread moves at once: 16 bytes where rows allow it, else one.
template <class S>
constexpr int kVectorOf = 16 / sizeof(S);

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// f.template operator()<S>() for the storage type at hand.
template <class F>
void dispatch_stored(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::Half:
      return f.template operator()<Half>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    default:
      return f.template operator()<float>();
  }
}

}  // namespace nf
