// The four storage types of the CPU kernels. 16-bit values travel as bare bits and become float at
// load; the conversions live in the per-ISA code (rows.inc), so that they vectorise with its loops.
#pragma once

#include <cstdint>

namespace nf::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class S>
struct AccumOf {
  using type = float;
};
template <>
struct AccumOf<double> {
  using type = double;
};
template <class S>
using accum_t = typename AccumOf<S>::type;

}  // namespace nf::cpu
