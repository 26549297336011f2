// The Python module `_C`: importing it registers every schema and the CPU kernels, and it says how it
// was built. It holds no op itself; those are reached through torch's dispatcher.
#include <pybind11/pybind11.h>

#include "cpu/interrupt.h"
#include "cpu/rows.h"
#include "math/softmax.h"
#include "plan_module.h"
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

bool has_fixed_shift(double scale, double classes, bool float64, double lowest, double highest) {
  const auto window = float64 ? nf::math::fixed_shift_of<double>(classes, lowest, highest)
                              : nf::math::fixed_shift_of<float>(classes, lowest, highest);
  return window.serves(scale);
}

pybind11::list row_fields() {
  pybind11::list fields;
  for (const nf::FieldRule& rule : nf::kRowRules)
    fields.append(pybind11::make_tuple(rule.name, rule.over_shards));
  return fields;
}

template <size_t count>
pybind11::list list_of(const char* const (&names)[count]) {
  pybind11::list result;
  for (const char* name : names) result.append(name);
  return result;
}

unsigned long main_thread = 0;  // Python's, the only one whose signals have handlers

struct Gil {
  PyGILState_STATE state = PyGILState_Ensure();
  ~Gil() { PyGILState_Release(state); }
};

// Runs the handlers of signals that have come; what they raise, KeyboardInterrupt as a rule, is thrown.
void check_signals() {
  if (!Py_IsInitialized() || PyThread_get_thread_ident() != main_thread) return;
  const Gil gil;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of normface_ext; used through torch.ops.normface_ext.";
  m.def("build_config", &build_config, "How this module was built, and the SIMD path in use.");
  nf::define_plan(m);
  m.def("has_fixed_shift", &has_fixed_shift, pybind11::arg("scale"), pybind11::arg("classes"),
        pybind11::arg("float64"), pybind11::arg("lowest") = -1.0, pybind11::arg("highest") = 1.0,
        "Whether one kappa serves every row, or the largest logits have to be found (csrc/math/softmax.h).");
  m.def("row_fields", &row_fields, "(name, how shards combine) of a row's fields (csrc/engine/row_state.h).");
  m.def(
      "slope_fields", [] { return list_of(nf::kSlopeNames); },
      "The slopes of a row's loss by name, those along the margin last.");
  m.def("terms", [] { return list_of(nf::kTermNames); }, "By their numbers (csrc/engine/terms.h).");
  m.def("sinks", [] { return list_of(nf::kSinkNames); }, "By their numbers (csrc/engine/terms.h).");
  const pybind11::object main = pybind11::module_::import("threading").attr("main_thread")();
  main_thread = main.attr("ident").cast<unsigned long>();
  nf::cpu::set_interrupt_check(&check_signals);
}
