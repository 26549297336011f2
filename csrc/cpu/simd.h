// A vector of lanes in the compiler's own terms (GCC and clang vector extensions), so that one loop
// body serves every instruction set; a compiler without them gets vectors of one lane.
// Included by rows.inc alone, once per instruction set: NF_ISA and NF_VECTOR_BYTES come from there.

#include "cpu/stored.h"
#include "math/exp.h"
#include "math/root.h"

namespace nf::cpu::NF_ISA {
namespace {

#if defined(__GNUC__)
constexpr int kVectorBytes = NF_VECTOR_BYTES;
template <class E, int bytes>
struct VectorOf {
  typedef E type __attribute__((vector_size(bytes)));
};
#define NF_CONVERT(value, Type) __builtin_convertvector(value, Type)
#define NF_PREFETCH(address) __builtin_prefetch(address)
#else
constexpr int kVectorBytes = 0;
template <class E, int bytes>
struct VectorOf {
  using type = E;
};
#define NF_CONVERT(value, Type) Type(value)
#define NF_PREFETCH(address) void(address)
#endif

template <class T>
constexpr int kLanes = kVectorBytes > 0 ? kVectorBytes / int(sizeof(T)) : 1;
template <class E, int lanes>
using VecN = typename VectorOf<E, lanes* int(sizeof(E))>::type;
template <class T>
using Vec = VecN<T, kLanes<T>>;

template <class To, class From>
NF_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// V and U below are float/uint32_t or equally wide vectors of them.
template <class V, class U>
NF_HD V half_to_float(U half) {
  const U magnitude = (half & 0x7FFF) << 13;
  const U sign = (half & 0x8000) << 16;
  // Moving the exponent from bias 15 to 127 is a multiplication, exact for subnormals too; infinity
  // and NaN must land on the all-ones exponent instead.
  const U scaled = bit_cast<U>(bit_cast<V>(magnitude) * 0x1p112f);
  const U special = magnitude | 0x7F800000;
  return bit_cast<V>(sign | (magnitude >= 0x0F800000 ? special : scaled));
}

template <class V, class U>
NF_HD U float_to_half(V x) {
  const U sign = (bit_cast<U>(x) >> 16) & 0x8000;
  const V magnitude = bit_cast<V>(bit_cast<U>(x) & 0x7FFFFFFF);
  // Adding 2^(e+13), e the exponent of x (at least that of the smallest normal half), leaves exactly
  // ten mantissa bits, rounded by the adder to nearest, ties to even.
  const U smallest = U{} + 0x38800000;
  const U own = bit_cast<U>(magnitude) & 0x7F800000;
  const U exponent = own < smallest ? smallest : own;
  const V anchor = bit_cast<V>(exponent + (13 << 23));
  const U mantissa = bit_cast<U>(magnitude + anchor) - bit_cast<U>(anchor);
  const U finite = mantissa + ((exponent - smallest) >> 13);
  const U infinite = U{} + 0x7C00, nan = U{} + 0x7E00;
  const U bounded = magnitude >= V{} + 65520.0f ? infinite : finite;
  return sign | (x == x ? bounded : nan);
}

template <class V, class U>
NF_HD V bfloat16_to_float(U bits) {
  return bit_cast<V>(bits << 16);
}

template <class V, class U>
NF_HD U float_to_bfloat16(V x) {
  const U bits = bit_cast<U>(x);
  const U rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const U nan = U{} + 0x7FC0;
  return x == x ? rounded : nan;
}

// One element, or a whole vector of consecutive ones, from storage to the accumulator type and back.
template <class S>
struct Lane {  // float, double
  using T = S;
  static NF_HD T load(const S* p) { return *p; }
  static NF_HD void store(S* p, T x) { *p = x; }
  static NF_HD Vec<T> load_vector(const S* p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static NF_HD Vec<T> stored(Vec<T> v) { return v; }
  static NF_HD void store_vector(S* p, Vec<T> v) { std::memcpy(p, &v, sizeof v); }
};

using Bits = VecN<uint32_t, kLanes<float>>;
using Shorts = VecN<uint16_t, kLanes<float>>;

// Half precision has instructions of its own, which give the same bits for every number.
NF_HD Vec<float> widen_half(Shorts bits) {
#if defined(NF_X86) && NF_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#elif defined(NF_X86) && NF_VECTOR_BYTES == 32
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  return half_to_float<Vec<float>, Bits>(NF_CONVERT(bits, Bits));
#endif
}
NF_HD Shorts narrow_half(Vec<float> x) {
#if defined(NF_X86) && NF_VECTOR_BYTES == 64
  return bit_cast<Shorts>(_mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(NF_X86) && NF_VECTOR_BYTES == 32
  return bit_cast<Shorts>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  return NF_CONVERT((float_to_half<Vec<float>, Bits>(x)), Shorts);
#endif
}
NF_HD Vec<float> widen_bfloat16(Shorts bits) {
  return bfloat16_to_float<Vec<float>, Bits>(NF_CONVERT(bits, Bits));
}
NF_HD Shorts narrow_bfloat16(Vec<float> x) {
  return NF_CONVERT((float_to_bfloat16<Vec<float>, Bits>(x)), Shorts);
}

template <class S, Vec<float> (*widen)(Shorts), Shorts (*narrow)(Vec<float>), float (*widen_one)(uint32_t),
          uint32_t (*narrow_one)(float)>
struct Lane16 {
  using T = float;
  static NF_HD float load(const S* p) { return widen_one(p->bits); }
  static NF_HD void store(S* p, float x) { p->bits = uint16_t(narrow_one(x)); }
  static NF_HD Vec<float> load_vector(const S* p) {
    Shorts bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen(bits);
  }
  static NF_HD Shorts stored(Vec<float> v) { return narrow(v); }
  static NF_HD void store_vector(S* p, Vec<float> v) {
    const Shorts bits = stored(v);
    std::memcpy(p, &bits, sizeof bits);
  }
};

template <>
struct Lane<Half>
    : Lane16<Half, widen_half, narrow_half, half_to_float<float, uint32_t>, float_to_half<float, uint32_t>> {
};
template <>
struct Lane<BFloat16> : Lane16<BFloat16, widen_bfloat16, narrow_bfloat16, bfloat16_to_float<float, uint32_t>,
                               float_to_bfloat16<float, uint32_t>> {};

NF_HD float exp_one(float x) { return math::exp_float<float, uint32_t>(x); }
NF_HD double exp_one(double x) { return math::exp_double<double, uint64_t>(x); }
NF_HD Vec<float> exp_lanes(Vec<float> x) {
  return math::exp_float<Vec<float>, VecN<uint32_t, kLanes<float>>>(x);
}
NF_HD Vec<double> exp_lanes(Vec<double> x) {
  return math::exp_double<Vec<double>, VecN<uint64_t, kLanes<double>>>(x);
}

NF_HD float root_one(float x) { return math::root_float<float, int32_t>(x); }
NF_HD double root_one(double x) { return math::root_double<double, int64_t>(x); }
NF_HD Vec<float> root_lanes(Vec<float> x) {
  return math::root_float<Vec<float>, VecN<int32_t, kLanes<float>>>(x);
}
NF_HD Vec<double> root_lanes(Vec<double> x) {
  return math::root_double<Vec<double>, VecN<int64_t, kLanes<double>>>(x);
}

NF_HD float lane_of(float v, int) { return v; }
NF_HD double lane_of(double v, int) { return v; }
template <class V>
NF_HD auto lane_of(const V& v, int l) {
  return v[l];
}

// The lanes of v added in pairs, each half to the other: one after the other they would wait longer than a short
// row takes.
template <int lanes>
NF_HD double add_lanes(const VecN<double, lanes>& v) {
  if constexpr (lanes <= 2) {
    double sum = lane_of(v, 0);
    for (int l = 1; l < lanes; ++l) sum += lane_of(v, l);
    return sum;
  } else {
    VecN<double, lanes / 2> half[2];
    std::memcpy(half, &v, sizeof v);
    return add_lanes<lanes / 2>(half[0] + half[1]);
  }
}

// Its lanes as doubles, the second half added to the first where one vector of doubles does not hold all.
template <class T>
NF_HD Vec<double> lanes_in_double(const Vec<T>& v) {
  constexpr int kParts = kLanes<T> / kLanes<double>;
  VecN<T, kLanes<double>> part[kParts];
  std::memcpy(part, &v, sizeof v);
  Vec<double> sum = NF_CONVERT(part[0], Vec<double>);
  for (int k = 1; k < kParts; ++k) sum += NF_CONVERT(part[k], Vec<double>);
  return sum;
}

// Each sum keeps kUnroll vectors of partial sums; with two sums in flight more would spill registers.
constexpr int kUnroll = 2;

// Calls step(j, slot) for whole vectors, slot < kUnroll cycling, then tail(j) for the rest.
template <class T, class Step, class Tail>
NF_HD void for_each(int64_t n, Step step, Tail tail) {
  constexpr int L = kLanes<T>;
  int64_t j = 0;
  for (; j + kUnroll * L <= n; j += kUnroll * L)
    for (int u = 0; u < kUnroll; ++u) step(j + u * L, u);
  for (; j + L <= n; j += L) step(j, 0);
  for (; j < n; ++j) tail(j);
}

template <class T>
struct Sum {
  Vec<T> part[kUnroll] = {};
  double rest = 0;
  NF_HD double total() const {
    Vec<double> sum = lanes_in_double<T>(part[0]);
    for (int u = 1; u < kUnroll; ++u) sum += lanes_in_double<T>(part[u]);
    return rest + add_lanes<kLanes<double>>(sum);
  }
};

}  // namespace
}  // namespace nf::cpu::NF_ISA
