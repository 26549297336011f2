// What the losses over agents share on CUDA.
#pragma once

#include "engine/agent_arguments.h"

namespace nf {

Tensor target_cosine(const TargetCosineArguments& in);  // cosine_pairs.cu

}  // namespace nf
