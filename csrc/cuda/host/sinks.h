// What a sweep collects besides its sums (engine/terms.h), chunk by chunk. Definition: sinks.cu.
#pragma once

#include <device/launch.cuh>

#include "cuda/device/row_state.cuh"
#include "cuda/device/term_rows.cuh"

namespace nf {

// A chunk of classes in a sweep over `classes` of them, which begins and ends somewhere.
struct SinkChunk {
  int64_t first;
  int64_t width;
  int64_t stride;  // of the rows of what lies in memory
  int64_t classes;

  NF_HD bool begins() const { return first == 0; }
  NF_HD bool ends() const { return first + width == classes; }
};

// Each row's first `capacity` classes with a coefficient that is not 0.
template <class T>
struct ListActive {
  SinkChunk chunk;
  int64_t splits;  // blocks of a row (device/row_splits.cuh)
  const void* e;   // [N, stride]
  bool e_is_bfloat16;
  RowState rows;
  int64_t capacity;
  int* counts;            // [splits, N], or null where there is one
  const int64_t* before;  // [N]: how many are listed by now
  int64_t* after;         // [N]: and after this chunk
  int64_t* listed;        // [N, capacity]
  T* found;               // [N, capacity]
};

// The class of each row's largest cosine, and at the end the sums of that one cell.
template <class T>
struct FindHardest {
  SinkChunk chunk;
  int64_t splits;   // blocks of a row
  const T* scores;  // [N, stride]
  TermRows terms;
  RowState rows;
  bool need_largest;   // in the rows too
  T* cosines;          // [splits, N]
  int64_t* places;     // [splits, N]
  unsigned* arrivals;  // [N], all 0
  int64_t* listed;     // [N]
  T* found;            // [N]
};

template <class T>
void list_active(Queue& queue, const ListActive<T>& task);
template <class T>
void find_hardest(Queue& queue, const FindHardest<T>& task);

}  // namespace nf
