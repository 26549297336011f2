// The Python module `_C`: importing it registers every schema and the CPU kernels, and it says how it
// was built. It holds no op itself; those are reached through torch's dispatcher.
#include <pybind11/pybind11.h>

#include "cpu/rows.h"
#include "math/softmax.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(normface_ext, m) { nf::define_ops(m); }

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_config() {
  pybind11::dict config;
  config["version"] = NF_VERSION;
  config["torch_built"] = NF_BUILD_TORCH;
  config["cuda_architectures"] = NF_CUDA_ARCHS;
  config["cuda_version"] = NF_CUDA_VERSION;
  config["compiler"] = compiler();
  config["simd"] = nf::cpu::row_table().isa;
  return config;
}

bool has_fixed_shift(double scale, double classes, bool float64) {
  return float64 ? nf::math::has_fixed_shift<double>(scale, classes)
                 : nf::math::has_fixed_shift<float>(scale, classes);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of normface_ext; used through torch.ops.normface_ext.";
  m.def("build_config", &build_config, "How this module was built, and the SIMD path in use.");
  m.def("has_fixed_shift", &has_fixed_shift,
        "Whether one kappa serves every row, or the largest logits have to be found (csrc/math/softmax.h).");
}
