// Kernels over many rows that more than one op launches. Definitions: rows.cu.
#pragma once

#include <device/launch.cuh>

#include "checks.h"
#include "cuda/device/stored.cuh"

namespace nf {

// Both sides of a product may share a factor: each takes the root of its magnitude, one of them the sign.
enum class FactorPart { kWhole, kSignedRoot, kRoot };

// y[r] = factor x[r] / ||x[r]|| for `rows` contiguous rows of `length`. y has any floating type (or is
// null), `copy` takes the unit rows once more in bfloat16, norm and inverse take ||x|| and 1/||x||
// in the accumulator type; each of them may be null.
struct UnitRows {
  const void* x;
  ScalarType type;
  int64_t rows;
  int64_t length;
  int p = 2;
  double eps;
  void* y = nullptr;
  ScalarType y_type = ScalarType::Float;
  void* copy = nullptr;
  void* norm = nullptr;
  void* inverse = nullptr;
  Scale factor{std::nullopt, 1.0};
  FactorPart part = FactorPart::kWhole;
};
void unit_rows(Queue& queue, const UnitRows& task);

// out[r] = factor inverse (g[r] - y <y, g[r]>), y = x[r] / ||x[r]||: the gradient with respect to x[r]
// of what has gradient g[r] with respect to y. g is in the accumulator type; out has the type of x and
// may be g itself where the types agree. `inverse` null means 1 / ||x|| is taken from x.
struct ProjectRows {
  const void* x;
  ScalarType type;
  int64_t rows;
  int64_t length;
  double eps;
  const void* inverse;
  const void* g;
  void* out;
  Scale factor{std::nullopt, 1.0};
};
void project_rows(Queue& queue, const ProjectRows& task);

}  // namespace nf
