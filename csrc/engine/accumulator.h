// From a tensor of any storage type to code for its accumulator type.
#pragma once

#include "checks.h"

namespace nf {

// f.template operator()<T>() for the accumulator type of a storage type.
template <class F>
auto dispatch_accumulator(ScalarType type, const F& f) {
  return accumulator(type) == ScalarType::Double ? f.template operator()<double>()
                                                 : f.template operator()<float>();
}

// The memory of a tensor that is known to hold T; null for an empty one.
template <class T>
T* data_of(const Tensor& t) {
  return t.numel() > 0 ? static_cast<T*>(const_cast<void*>(t.const_data_ptr())) : nullptr;
}

}  // namespace nf
