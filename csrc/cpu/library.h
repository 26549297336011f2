// What every CPU kernel file needs of its surroundings: registration, rows of a tensor, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "checks.h"
#include "cpu/rows.h"
#include "engine/accumulator.h"
#include "engine/block.h"

// The sanitizer build of these files registers them beside the real ones, in a namespace of its own.
#ifndef NF_NAMESPACE
#define NF_NAMESPACE normface_ext
#endif
#define NF_CPU_LIBRARY_IN(ns, m) STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m)
#define NF_CPU_LIBRARY(m) NF_CPU_LIBRARY_IN(NF_NAMESPACE, m)

namespace nf::cpu {

template <class T>
const StoredRows<T>& stored_rows(ScalarType type);
template <>
inline const StoredRows<double>& stored_rows<double>(ScalarType) {
  return row_table().float64;
}
template <>
inline const StoredRows<float>& stored_rows<float>(ScalarType type) {
  if (type == ScalarType::Half) return row_table().float16;
  if (type == ScalarType::BFloat16) return row_table().bfloat16;
  return row_table().float32;
}

// A tensor's memory as rows of `length` elements, storage type erased.
template <class T>
struct Rows {
  const StoredRows<T>& kernel;
  char* data;  // [rows, length]
  int64_t length;

  Rows(const Tensor& t, int64_t row_length)
      : kernel(stored_rows<T>(t.scalar_type())),
        data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))),
        length(row_length) {}

  void* row(int64_t i) const { return data + i * length * kernel.item; }
};

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// Calls body(slot, begin, end) once for each of `slots` contiguous parts of [0, count), in parallel.
// The parts depend only on `slots`, so sums kept per slot and added in order do not vary between runs.
template <class Body>
void for_slots(int64_t slots, int64_t count, const Body& body) {
  if (slots == 1) return body(0, 0, count);
  torch::stable::parallel_for(0, slots, 1, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot)
      body(slot, slot * count / slots, (slot + 1) * count / slots);
  });
}

// Calls body(begin, end) for contiguous parts of rows [0, count) in parallel, `cost` elements each.
template <class Body>
void for_row_runs(int64_t count, int64_t cost, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cost));
  const int64_t slots = std::min(thread_count(), (count + grain - 1) / grain);
  for_slots(std::max<int64_t>(1, slots), count,
            [&](int64_t, int64_t begin, int64_t end) { body(begin, end); });
}

// The same row by row.
template <class Body>
void for_rows(int64_t count, int64_t cost, const Body& body) {
  for_row_runs(count, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// A fresh tensor. Memory that is large enough is asked for in huge pages: touching new 4 KiB pages one
// by one can cost more than everything computed on them.
Tensor fresh(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type);
Tensor fresh_like(const Tensor& t);
void allocate(Block& block);

// The pages of a large fresh tensor that are not there yet. The thread that is about to write a block asks for all
// of it at once: one by one, each small page costs a trap of its own.
class NewPages {
 public:
  explicit NewPages(const Tensor& t);
  void ask_for(void* begin, int64_t bytes) const;
  // Whether there are any. The system zeroes them shortly before they are written, so they are in the caches by then.
  bool found() const { return found_; }

 private:
  bool found_ = false;
  bool any_ = false;  // that have to be asked for
  uintptr_t page_ = 0;
};

// The last caches of the processors that torch's threads take, together.
int64_t last_cache_bytes();

// Where a gradient will be written: like `t`, or empty where it was not asked for.
inline Tensor gradient_like(const Tensor& t, bool needed) {
  return needed ? fresh(t.sizes(), t.scalar_type()) : fresh({0}, t.scalar_type());
}

// The same for one shard's part of a gradient: added to others before it is rounded, so not yet rounded.
inline Tensor partial_gradient_like(const Tensor& x, bool needed, bool is_shard) {
  if (!needed || !is_shard) return gradient_like(x, needed);
  return fresh({x.size(0), x.size(1)}, accumulator(x.scalar_type()));
}

}  // namespace nf::cpu
