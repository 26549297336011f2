// What Python asks about products and plans (engine/plan.h).
#pragma once

#include <pybind11/pybind11.h>

namespace nf {

void define_plan(pybind11::module_& m);

}  // namespace nf
