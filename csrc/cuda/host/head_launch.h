// Kernels and chunk of an op of the engine on CUDA.
#pragma once

#include <device/launch.cuh>

#include "engine/head_launch.h"

namespace nf {

// Whether sm90_*.cu were compiled for the one architecture that has their instructions.
#ifdef NF_SM90A
constexpr bool kBuiltForSm90a = true;
#else
constexpr bool kBuiltForSm90a = false;
#endif

// Of the queue's device. Its name takes long to ask for, and a thread seldom changes devices.
inline const DeviceFacts& facts_of(const Queue& queue) {
  thread_local int known = -1;
  thread_local DeviceFacts facts;
  if (known != queue.device()) {
    facts = {.cuda = true,
             .threads = 1,
             .multiprocessors = queue.multiprocessors(),
             .shared_limit = queue.shared_limit(),
             .capability = queue.architecture(),
             .rates = &rates_of(true, queue.name()),
             .wgmma = kBuiltForSm90a && queue.architecture() == 90};
    known = queue.device();
  }
  return facts;
}

inline bool is_16_bit_product(const HeadInputs& in) {
  return in.product_precision == ScalarType::Half || in.product_precision == ScalarType::BFloat16;
}

// The classes [first, first + width).
struct Chunk {
  int64_t first;
  int64_t width;

  // Rows of scores and of E begin at multiples of 16 bytes whatever the width is.
  int64_t stride() const { return (width + 7) / 8 * 8; }
};

// All of E, where it is kept.
inline StoredCells stored_cells(const HeadInputs& in) {
  return {in.x.size(0) * Chunk{0, in.weight.size(0)}.stride(),
          is_16_bit_product(in) ? ScalarType::BFloat16 : accumulator(in.x.scalar_type())};
}

inline HeadLaunch launch_of(const char* op, const Queue& queue, const HeadInputs& in, bool store, Held held) {
  const int64_t wide = accumulator(in.x.scalar_type()) == ScalarType::Double ? 8 : 4;
  return launch_of(op, in, is_16_bit_product(in) ? 2 : wide, facts_of(queue), store, held);
}

}  // namespace nf
