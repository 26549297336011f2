// Tiles and threads of an op of the engine on the CPU.
#pragma once

#include "cpu/head.h"
#include "engine/head_launch.h"

namespace nf::cpu {

inline HeadShape shape_of(const char* op, const HeadInputs& in, bool store) {
  const DeviceFacts device{.cuda = false,
                           .threads = thread_count(),
                           .multiprocessors = 0,
                           .shared_limit = 0,
                           .capability = 0,
                           .rates = &kCpuRates};
  const int64_t item = accumulator(in.x.scalar_type()) == ScalarType::Double ? 8 : 4;
  return HeadShape(in.x, in.weight, launch_of(op, in, item, device, store, Held::kNothing).chunk, in.centers);
}

// Values of stored coefficients (row_terms.h).
inline int64_t stored_count(const HeadInputs& in) { return in.x.size(0) * in.weight.size(0) + 1; }

// The tiles in which coefficients were stored.
template <class T>
HeadShape shape_of_stored(const char* op, const HeadBackwardTensors& in) {
  const int64_t count = stored_count(in);
  check_stored(op, in, accumulator(in.x.scalar_type()), count);
  const T width = data_of<const T>(in.stored)[count - 1];
  if (!(width >= T(1) && width <= T(std::max<int64_t>(1, in.weight.size(0)))) ||
      (in.weight.size(0) > 0 && int64_t(width) % in.centers != 0))
    fail(op, ": expected `stored` to end with how wide a tile is, got ", width);
  return HeadShape(in.x, in.weight, int64_t(width), in.centers);
}

}  // namespace nf::cpu
