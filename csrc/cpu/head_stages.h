// The stages of a step on the CPU, for ops that go through several: arguments checked, memory made.
#pragma once

#include "engine/head_arguments.h"

namespace nf::cpu {

// `op` is what a wrong label is told of.
void sweep_into(const char* op, const HeadSweepArguments& in, const SweepResult& out);
void finish_into(const FinishInputs& in, const FinishedRows& of);
std::tuple<Tensor, Tensor, Tensor> gradients_of(const HeadBackwardArguments& in);

}  // namespace nf::cpu
