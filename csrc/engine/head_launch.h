// The choice of plan.h for an op of the engine, at its launch.
#pragma once

#include "engine/head_arguments.h"
#include "engine/plan.h"
#include "engine/terms.h"

namespace nf {

struct HeadLaunch {
  Makers makers;
  int64_t chunk;  // classes at once
};

// For the classes at hand, E kept or not; `item` is what an operand of the products has in bytes.
inline HeadLaunch launch_of(const char* op, const HeadInputs& in, int64_t item, const DeviceFacts& device,
                            bool store, Held held) {
  const int64_t classes = std::max<int64_t>(1, in.weight.size(0));
  const ProductShape shape{
      in.x.size(0), std::max<int64_t>(1, in.x.size(1)), classes, item, in.term == kSoftmaxTerm, held,
      in.centers};
  const Way way = choose(kProducts, shape, device, in.workspace, store, in.product);
  if (way.product == nullptr)
    fail(op, ": expected `product` to be \"auto\" or the name of one for this device",
         store ? " that keeps E" : "", ", got \"", in.product, "\"");
  if (way.refusal != Refusal::kNone)
    fail(op, ": expected a `product` that takes D=", shape.dim, " in ", item, " bytes on this device, got \"",
         in.product, "\"");
  if (way.chunk == 0)
    fail(op, ": expected `workspace` of at least ", way.bytes, " bytes, got ", in.workspace);
  return {way.product->makers, way.chunk};
}

}  // namespace nf
