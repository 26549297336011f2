// pair_distance, d(a_i, b_i), and its backward on the CPU.
#include <vector>

#include "cpu/library.h"
#include "engine/distance_arguments.h"
#include "engine/distance_checks.h"

namespace nf::cpu {
namespace {

template <class T>
void pair_forward(const Rows<T>& a, const Rows<T>& b, int64_t batch, int p, T* out) {
  for_rows(batch, a.length, [&](int64_t i) {
    std::vector<T> rows(static_cast<size_t>(2 * a.length));
    a.kernel.widen(a.row(i), a.length, T(1), rows.data());
    b.kernel.widen(b.row(i), a.length, T(1), rows.data() + a.length);
    out[i] = T(accum_rows<T>().distance(rows.data(), rows.data() + a.length, a.length, p));
  });
}

template <class T>
void pair_backward(const T* grad, const Rows<T>& a, const Rows<T>& b, int64_t batch, int p, Tensor* da,
                   Tensor* db) {
  const int64_t D = a.length;
  for_rows(batch, D, [&](int64_t i) {
    std::vector<T> rows(static_cast<size_t>(3 * D), T(0));
    T *first = rows.data(), *second = first + D, *slope = second + D;
    a.kernel.widen(a.row(i), D, T(1), first);
    b.kernel.widen(b.row(i), D, T(1), second);
    accum_rows<T>().add_distance_slope(grad[i], first, second, slope, D, p);
    if (da != nullptr) a.kernel.store_as(slope, D, T(1), Rows<T>(*da, D).row(i));
    if (db != nullptr) b.kernel.store_as(slope, D, T(-1), Rows<T>(*db, D).row(i));
  });
}

Tensor pair_distance(const PairDistanceArguments& in) {
  const Tensor &a = in.a, &b = in.b;
  check_pair(in.kName, a, b, in.p);
  Tensor out = fresh({a.size(0)}, accumulator(a.scalar_type()));
  dispatch_accumulator(a.scalar_type(), [&]<class T>() {
    pair_forward<T>(Rows<T>(a, a.size(1)), Rows<T>(b, a.size(1)), a.size(0), int(in.p), data_of<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> pair_distance_backward(const PairDistanceBackwardArguments& in) {
  const Tensor &a = in.a, &b = in.b;
  check_pair_backward(in.kName, in.grad, a, b, in.p);
  Tensor da = gradient_like(a, in.need_a), db = gradient_like(b, in.need_b);
  dispatch_accumulator(a.scalar_type(), [&]<class T>() {
    pair_backward<T>(data_of<const T>(in.grad), Rows<T>(a, a.size(1)), Rows<T>(b, a.size(1)), a.size(0),
                     int(in.p), in.need_a ? &da : nullptr, in.need_b ? &db : nullptr);
  });
  return {da, db};
}

}  // namespace
}  // namespace nf::cpu

NF_CPU_LIBRARY(m) {
  nf::implement<&nf::cpu::pair_distance>(m);
  nf::implement<&nf::cpu::pair_distance_backward>(m);
}
