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
  const void* e;  // [N, stride]
  bool e_is_bfloat16;
  RowState rows;
  int64_t capacity;
  int64_t* placed;  // [N]: how many are listed by now
  int64_t* listed;  // [N, capacity]
  T* found;         // [N, capacity]
};

// The class of each row's largest cosine, and at the end the sums of that one cell.
template <class T>
struct FindHardest {
  SinkChunk chunk;
  const T* scores;  // [N, stride]
  TermRows terms;
  RowState rows;
  bool need_largest;  // in the rows too
  int64_t* listed;    // [N]
  T* found;           // [N]
};

template <class T>
void list_active(Queue& queue, const ListActive<T>& task);
template <class T>
void find_hardest(Queue& queue, const FindHardest<T>& task);

}  // namespace nf
