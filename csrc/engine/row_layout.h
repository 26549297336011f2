// How the rows that `normalize` works on lie in memory: element d of row (o, i) is at
// (o * length + d) * inner + i. inner == 1: a row is contiguous; otherwise it is a channel axis.
#pragma once

#include "checks.h"

namespace nf {

struct RowLayout {
  int64_t outer;
  int64_t length;
  int64_t inner;
};

inline RowLayout row_layout(const char* op, const Tensor& x, int64_t dim) {
  if (dim < 0 || dim >= x.dim()) fail(op, ": expected `dim` in [0, ", x.dim(), "), got ", dim);
  RowLayout rows{1, x.size(dim), 1};
  for (int64_t d = 0; d < dim; ++d) rows.outer *= x.size(d);
  for (int64_t d = dim + 1; d < x.dim(); ++d) rows.inner *= x.size(d);
  if (x.is_contiguous()) return rows;
  // Not contiguous: `dim` must be innermost and the other axes in order (channels_last).
  int64_t expected = rows.length;
  bool innermost = rows.length <= 1 || x.stride(dim) == 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (d == dim) continue;
    innermost = innermost && (x.size(d) <= 1 || x.stride(d) == expected);
    expected *= x.size(d);
  }
  if (!innermost)
    fail(op, ": expected `x` to be contiguous or to have dim ", dim, " innermost in memory, got strides ",
         "of another order");
  return {rows.outer * rows.inner, rows.length, 1};
}

}  // namespace nf
