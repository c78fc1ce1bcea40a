// The Python side of the wgmma kernel that normalizes.
#pragma once

#include <pybind11/pybind11.h>
#include <wgmma/layer_norm_call.h>

namespace sparsebert::wgmma {

// `run` does a call that has been checked.
void bind_layer_norm(pybind11::module_& module, void (*run)(const NormCall&));

}  // namespace sparsebert::wgmma
