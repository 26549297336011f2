// The stages of a step on CUDA, for ops that go through several: arguments checked, memory made.
#pragma once

#include <device/launch.cuh>

#include "engine/head_arguments.h"

namespace nf {

void sweep_into(Queue& queue, const HeadSweepArguments& in, const SweepResult& out);
void finish_into(Queue& queue, const FinishInputs& in, const FinishedRows& of);
std::tuple<Tensor, Tensor, Tensor> gradients_of(const HeadBackwardArguments& in);

}  // namespace nf
