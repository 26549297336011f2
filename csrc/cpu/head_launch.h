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
  return HeadShape(in.x, in.weight, launch_of(op, in, item, device, store, Held::kNothing).chunk);
}

}  // namespace nf::cpu
