// Memory that an op call holds in one tensor, in pieces: its scratch, or what forward leaves for backward. A tensor
// of its own for each of them costs the host more than a small call's arithmetic.
//
//   Block scratch;
//   const Array x_hat = scratch.array<float>(N * D), sums = scratch.array<double>(2 * N);
//   scratch.allocate([&](int64_t bytes) { return fresh({bytes}, ScalarType::Byte); });  // all are named by now
//   float* unit = data_of<float>(x_hat);
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "checks.h"
#include "engine/accumulator.h"

namespace nf {

// Of a tensor, as the C shim of torch numbers it.
struct Place {
  int32_t device;
  int32_t index;

  explicit Place(const Tensor& t) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
  }
  Place(int32_t of_device, int32_t at) : device(of_device), index(at) {}
};

inline int32_t type_of_torch(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      return aoti_torch_dtype_float32();
  }
}

// A new contiguous tensor, uninitialised, or filled where torch is told to fill such memory. Not by
// torch::stable::empty, which looks for an op by its name at every call.
inline Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type,
                         const Place& place) {
  static AtenTensorHandle some = [] {  // the call wants a tensor; it lives as long as the process
    const int64_t none = 0, one = 1;
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &none, &one, aoti_torch_dtype_float32(),
                                                    aoti_torch_device_type_cpu(), 0, &made));
    return made;
  }();
  return allocated(sizes, type, [&] {
    int32_t dtype = type_of_torch(type), layout = aoti_torch_layout_strided(), device = place.device;
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(some, sizes.data(), int64_t(sizes.size()), &dtype,
                                                     &layout, &device, place.index, nullptr, &made));
    return Tensor(made);
  });
}

class Block;

// Values that lie one behind another: a piece of a block, or a tensor's.
class Array {
 public:
  Array() = default;
  Array(const Tensor& t)  // NOLINT: a tensor is one
      : count_(t.numel()), type_(t.scalar_type()), place_(reinterpret_cast<intptr_t>(t.const_data_ptr())) {}

  int64_t count() const { return count_; }
  ScalarType type() const { return type_; }
  void* data() const;  // null where it is empty

 private:
  friend class Block;
  int64_t count_ = 0;
  ScalarType type_ = ScalarType::Byte;
  const Block* of_ = nullptr;
  intptr_t place_ = 0;  // in the block, or the address
};

class Block {
 public:
  // Where pieces begin: the widest access of a kernel, and a cache line of a GPU.
  static constexpr int64_t kAlignment = 128;

  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  Array array(int64_t count, ScalarType type) {
    Array piece;
    piece.count_ = count;
    piece.type_ = type;
    piece.of_ = this;
    piece.place_ = bytes_;
    bytes_ += (count * item_of(type) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  template <class T>
  Array array(int64_t count) {
    constexpr ScalarType type = std::is_same_v<T, double>    ? ScalarType::Double
                                : std::is_same_v<T, int64_t> ? ScalarType::Long
                                : std::is_same_v<T, int>     ? ScalarType::Int
                                                             : ScalarType::Float;
    static_assert(sizeof(T) == (type == ScalarType::Double || type == ScalarType::Long ? 8 : 4));
    return array(count, type);
  }

  int64_t bytes() const { return bytes_; }
  // make(bytes) is a tensor of so many.
  template <class Make>
  void allocate(const Make& make) {
    if (bytes_ > 0) lie_in(make(bytes_));
  }
  void lie_in(const Tensor& memory) {
    memory_ = memory;
    begin_ = static_cast<char*>(const_cast<void*>(memory.const_data_ptr()));
  }

 private:
  friend class Array;
  static int64_t item_of(ScalarType type) {
    switch (type) {
      case ScalarType::Double:
      case ScalarType::Long:
        return 8;
      case ScalarType::Float:
      case ScalarType::Int:
        return 4;
      case ScalarType::Half:
      case ScalarType::BFloat16:
        return 2;
      default:
        return 1;
    }
  }

  int64_t bytes_ = 0;
  char* begin_ = nullptr;
  std::optional<Tensor> memory_;
};

inline void* Array::data() const {
  if (count_ == 0) return nullptr;
  return of_ != nullptr ? of_->begin_ + place_ : reinterpret_cast<void*>(place_);
}

// A contiguous tensor of what lies there, which does not own it.
inline Tensor view_of(const Array& array, std::initializer_list<int64_t> sizes, const Place& place) {
  int64_t strides[4] = {1, 1, 1, 1}, stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes.begin()[d]);
  }
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_create_tensor_from_blob(array.data(), int64_t(sizes.size()), sizes.begin(), strides, 0,
                                         type_of_torch(array.type()), place.device, place.index, &made));
  return Tensor(made);
}

// The memory that is known to hold T; null for an empty one.
template <class T>
T* data_of(const Array& array) {
  return static_cast<T*>(array.data());
}

}  // namespace nf
