// A step of the softmax's loss in one op, and its backward, on the CPU.
#include "engine/softmax_loss.h"

#include "cpu/head_launch.h"
#include "cpu/head_stages.h"

namespace nf::cpu {
namespace {

struct Stages {
  static Tensor fresh(const Tensor&, std::initializer_list<int64_t> sizes, ScalarType type) {
    return cpu::fresh(sizes, type);
  }
  static StoredCells cells(const HeadInputs& in) {
    return {stored_count(in), accumulator(in.x.scalar_type())};
  }
  static void sweep(const HeadSweepArguments& in, const SweepResult& out) {
    sweep_into(SoftmaxLossArguments::kName, in, out);
  }
  static void finish(const FinishInputs& in, const FinishedRows& of) { finish_into(in, of); }
  static std::tuple<Tensor, Tensor, Tensor> backward(const HeadBackwardArguments& in) {
    return gradients_of(in);
  }
};

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::softmax_loss<nf::cpu::Stages>>(m);
  nf::implement<&nf::softmax_loss_backward<nf::cpu::Stages>>(m);
}
