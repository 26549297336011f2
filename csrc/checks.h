// The second line of argument checks: the Python door (normface_ext/engine/checks.py) has said it better
// before, but an op can be called without passing the door. Sentences read
// "op: expected `argument` to ..., got ...".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "engine/row_state.h"

namespace nf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ']';
  return text.str();
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    default:
      return "another dtype";
  }
}

// What `make` allocates. Why an allocation failed does not pass the stable ABI; Python knows the case by this
// sentence (normface_ext/engine/memory.py).
template <class Sizes, class Make>
Tensor allocated(const Sizes& sizes, ScalarType type, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    std::ostringstream shape;
    for (size_t d = 0; d < sizes.size(); ++d) shape << (d ? ", " : "") << sizes[d];
    fail("normface_ext: could not allocate ", name_of(type), " of shape [", shape.str(), "]: out of memory");
  }
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

// float64 for float64, float32 for everything else.
inline ScalarType accumulator(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_normalize(const char* op, const Tensor& x, int64_t p) {
  if (!is_floating(x.scalar_type()))
    fail(op, ": expected `x` to be float64, float32, float16 or bfloat16, got ", name_of(x.scalar_type()));
  if (p != 1 && p != 2) fail(op, ": expected `p` to be 1 or 2, got ", p);
}

inline void check_matrix(const char* op, const char* name, const Tensor& t) {
  if (!is_floating(t.scalar_type()))
    fail(op, ": expected `", name, "` to be float64, float32, float16 or bfloat16, got ",
         name_of(t.scalar_type()));
  if (t.dim() != 2 || !t.is_contiguous())
    fail(op, ": expected `", name, "` to be 2-D and contiguous, got shape ", shape_of(t));
}

// A number that comes as a tensor is read where x lies.
inline void check_number(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x) {
  if (!t) return;
  if (t->dim() != 0 || !is_floating(t->scalar_type()))
    fail(op, ": expected `", name, "` to be a 0-d floating tensor, got ", name_of(t->scalar_type()),
         " of shape ", shape_of(*t));
  if (t->device().type() != x.device().type() || t->get_device_index() != x.get_device_index())
    fail(op, ": expected `", name, "` on the device of `x`, got it on another");
}

// A number per row of x, or one for all.
inline void check_row_numbers(const char* op, const char* name, const std::optional<Tensor>& t,
                              const Tensor& x) {
  if (!t) return;
  const bool per_row = t->dim() == 1 && t->size(0) == x.size(0) && t->is_contiguous();
  if (!is_floating(t->scalar_type()) || !(t->dim() == 0 || per_row))
    fail(op, ": expected `", name, "` to be a floating tensor, 0-d or contiguous of shape [", x.size(0),
         "], got ", name_of(t->scalar_type()), " of shape ", shape_of(*t));
  if (t->device().type() != x.device().type() || t->get_device_index() != x.get_device_index())
    fail(op, ": expected `", name, "` on the device of `x`, got it on another");
}

inline void check_shape(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  if (t.dim() != 2 || t.size(0) != rows || t.size(1) != columns)
    fail(op, ": expected `", name, "` to have shape [", rows, ", ", columns, "], got ", shape_of(t));
}

// What a kernel reads as it lies.
inline void check_exact(const char* op, const char* name, const Tensor& t, ScalarType type,
                        std::initializer_list<int64_t> sizes) {
  bool same = t.scalar_type() == type && t.is_contiguous() && t.dim() == int64_t(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) same = same && t.size(d++) == size;
  if (same) return;
  std::ostringstream shape;
  for (d = 0; int64_t size : sizes) shape << (d++ ? ", " : "") << size;
  fail(op, ": expected `", name, "` to be contiguous ", name_of(type), " of shape [", shape.str(), "], got ",
       name_of(t.scalar_type()), " of shape ", shape_of(t));
}

// `least`: 0 for a shard of the classes, which may have none.
inline void check_head(const char* op, const Tensor& x, const Tensor& weight, int64_t least = 1) {
  check_matrix(op, "x", x);
  check_matrix(op, "weight", weight);
  if (x.size(1) != weight.size(1))
    fail(op, ": expected `weight` to be [C, ", x.size(1), "], got ", shape_of(weight));
  if (weight.size(0) < least) fail(op, ": expected `weight` to have at least one class, got none");
  if (accumulator(x.scalar_type()) != accumulator(weight.scalar_type()))
    fail(op, ": expected `x` and `weight` to be both float64 or both not, got ", name_of(x.scalar_type()),
         " and ", name_of(weight.scalar_type()));
}

inline void check_weights(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x,
                          int64_t count) {
  if (t && (t->scalar_type() != accumulator(x.scalar_type()) || t->dim() != 1 || t->size(0) != count ||
            !t->is_contiguous()))
    fail(op, ": expected `", name, "` to be contiguous ", name_of(accumulator(x.scalar_type())),
         " of shape [", count, "], got ", name_of(t->scalar_type()), " of shape ", shape_of(*t));
}

inline void check_centers(const char* op, int64_t centers, const Tensor& weight) {
  if (centers < 1 || weight.size(0) % centers != 0)
    fail(op, ": expected `centers` of at least 1 that divides the ", weight.size(0),
         " rows of `weight`, got ", centers);
}

inline void check_labels(const char* op, const Tensor& labels, int64_t batch) {
  if (labels.scalar_type() != ScalarType::Long || labels.dim() != 1 || labels.size(0) != batch ||
      !labels.is_contiguous())
    fail(op, ": expected `labels` to be contiguous int64 of shape [", batch, "], got ",
         name_of(labels.scalar_type()), " of shape ", shape_of(labels));
}

inline void check_shift(const char* op, const std::optional<Tensor>& shift, int64_t batch) {
  if (shift && (shift->scalar_type() != ScalarType::Double || shift->dim() != 1 || shift->size(0) != batch ||
                !shift->is_contiguous()))
    fail(op, ": expected `shift` to be contiguous float64 of shape [", batch, "], got ",
         name_of(shift->scalar_type()), " of shape ", shape_of(*shift));
}

}  // namespace nf
