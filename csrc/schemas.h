// Every op of the library, once. Kernels attach to these names from cpu/ and cuda/, fake kernels from
// ops.py of every family; the test build of the CUDA kernels defines the same list in its own namespace.
//
// scale is a float, or a tensor on the device of x when `scale` is given (then scale_value is not read): 0-d,
// or for the head [N] too. Empty outputs (numel 0) stand for results that were not asked for.
#pragma once

#include <torch/csrc/stable/library.h>

#include "engine/agent_arguments.h"
#include "engine/cosine_arguments.h"
#include "engine/distance_arguments.h"
#include "engine/head_arguments.h"
#include "engine/softmax_loss_arguments.h"
#include "engine/update_arguments.h"

namespace nf {

inline void define_metric_ops(torch::stable::detail::StableLibrary& m) {
  define<InnerDistanceArguments>(m);
  define<InnerDistanceBackwardArguments>(m);
  define<PairDistanceArguments>(m);
  define<PairDistanceBackwardArguments>(m);

  define<TargetCosineArguments>(m);
  define<TargetCenterArguments>(m);
  define<HingeThresholdArguments>(m);
  define<HingeSlopesArguments>(m);
  define<HingePairsArguments>(m);
  define<CosinePairsBackwardArguments>(m);
}

inline void define_ops(torch::stable::detail::StableLibrary& m) {
  define_metric_ops(m);

  define<NormalizeArguments>(m);
  define<NormalizeBackwardArguments>(m);
  define<NormLinearArguments>(m);
  define<NormLinearBackwardArguments>(m);

  define<HeadSweepArguments>(m);
  define<HeadShiftArguments>(m);
  define<SoftmaxFinishArguments>(m);
  define<HeadBackwardArguments>(m);
  define<SoftmaxLossArguments>(m);
  define<SoftmaxLossBackwardArguments>(m);
  define<HeadUpdateArguments>(m);
}

}  // namespace nf
