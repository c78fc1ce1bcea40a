// The Python side of the 2:4 kernel.
#pragma once

#include <nm24/check.h>
#include <pybind11/pybind11.h>

namespace sparsebert::nm24 {

// `run` does a call that has been checked.
void bind(pybind11::module_& module, void (*run)(const Call&));

}  // namespace sparsebert::nm24
