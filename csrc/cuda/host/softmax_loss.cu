// A step of the softmax's loss in one op, and its backward, on CUDA.
#include "cuda/host/head_launch.h"
#include "cuda/host/head_stages.h"
#include "cuda/products/cublas.h"
#include "engine/softmax_loss.h"

namespace nf {
namespace {

struct Stages {
  static Tensor fresh(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
    return device_empty(like, sizes, type);
  }
  static StoredCells cells(const HeadInputs& in) { return stored_cells(in); }
  static void sweep(const HeadSweepArguments& in, const SweepResult& out) {
    Queue queue(in.x);
    sweep_into(queue, in, out);
  }
  static void finish(const FinishInputs& in, const FinishedRows& of) {
    Queue queue(in.x);
    finish_into(queue, in, of);
  }
  static std::tuple<Tensor, Tensor, Tensor> backward(const HeadBackwardArguments& in) {
    return gradients_of(in);
  }
};

}  // namespace
}  // namespace nf

NF_CUDA_LIBRARY(m) {
  nf::implement<&nf::softmax_loss<nf::Stages>>(m);
  nf::implement<&nf::softmax_loss_backward<nf::Stages>>(m);
}
