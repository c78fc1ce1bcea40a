// The Python side of the wgmma kernel.
#pragma once

#include <pybind11/pybind11.h>
#include <wgmma/check.h>

namespace sparsebert::wgmma {

// `run` does a call that has been checked.
void bind(pybind11::module_& module, void (*run)(const Call&));

}  // namespace sparsebert::wgmma
