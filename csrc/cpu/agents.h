// What the losses over agents share on the CPU.
#pragma once

#include "engine/agent_arguments.h"

namespace nf::cpu {

Tensor target_cosine(const TargetCosineArguments& in);  // cosine_pairs.cpp

}  // namespace nf::cpu
