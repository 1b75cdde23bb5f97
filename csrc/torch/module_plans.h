// The plans of the CUDA kernels, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace omni_moe::torch_api {

// Adds plan_<op>(sizes…, dtype, gpu) for every op with CUDA kernels: see omni_moe.plan.
void add_plans(pybind11::module_& m);

}  // namespace omni_moe::torch_api
