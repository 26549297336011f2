// Rows of dW into the weight and its optimizer's states, or into the gradient that is there.
#include "cuda/device/per_row.cuh"
#include "cuda/device/stored.cuh"
#include "cuda/host/update_rows.h"

namespace nf {
namespace {

struct DeviceRoot {
  template <class T>
  NF_DEVICE T operator()(T x) const {
    return sqrt(x);
  }
};

// kVec numbers per thread, which divides count. What a rule does not have is null, and neither read nor written.
template <class S, int kVec, class Rule>
NF_KERNEL(kThreads)
update_kernel(Rule rule, const S* __restrict__ g, S* __restrict__ w, S* __restrict__ state1,
              S* __restrict__ state2, int64_t count)  // [count] each
{
  using T = accum_t<S>;
  const int64_t at = (block_id() * kThreads + thread_id()) * kVec;
  if (at >= count) return;
  const auto of_g = load_vector<kVec>(g + at);
  Vector<S, kVec> of_w{}, first{}, second{};
  if constexpr (Rule::kMovesWeight) of_w = load_vector<kVec>(w + at);
  if constexpr (Rule::kStates > 0) first = load_vector<kVec>(state1 + at);
  if constexpr (Rule::kStates > 1) second = load_vector<kVec>(state2 + at);
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    T weight = T(of_w.at[e]), m = T(first.at[e]), v = T(second.at[e]);
    rule(T(of_g.at[e]), weight, m, v, DeviceRoot());
    of_w.at[e] = S(weight), first.at[e] = S(m), second.at[e] = S(v);
  }
  if constexpr (Rule::kMovesWeight) store_vector<kVec>(w + at, of_w);
  if constexpr (Rule::kStates > 0) store_vector<kVec>(state1 + at, first);
  if constexpr (Rule::kStates > 1) store_vector<kVec>(state2 + at, second);
}

}  // namespace

void update_rows(Queue& queue, const HeadUpdateArguments& in, int64_t first, int64_t width, const Array& dw) {
  const int64_t D = in.weight.size(1), count = width * D;
  dispatch_stored(in.weight.scalar_type(), [&]<class S>() {
    const auto rows = [&](const Tensor& t) { return data_of<S>(t) + first * D; };
    S *w = rows(in.weight), *state1 = in.state1 ? rows(*in.state1) : nullptr,
      *state2 = in.state2 ? rows(*in.state2) : nullptr;
    const S* g = data_of<const S>(dw);
    const bool vectors =
        count % kVectorOf<S> == 0 && aligned16(g) && aligned16(w) && aligned16(state1) && aligned16(state2);
    math::dispatch_update<accum_t<S>>(in.update, in.by, [&]<class Rule>() {
      const auto run = [&]<int kVec>(std::integral_constant<int, kVec>) {
        launch("update_rows", queue, update_kernel<S, kVec, Rule>, thread_per(count / kVec), kThreads, 0,
               Rule(in.by), g, w, state1, state2, count);
      };
      if (vectors)
        run(std::integral_constant<int, kVectorOf<S>>());
      else
        run(std::integral_constant<int, 1>());
    });
  });
}

}  // namespace nf
