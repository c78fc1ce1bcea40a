// The Python side of the 2:4 kernel.
#pragma once

#include <pybind11/pybind11.h>

namespace sparsebert::nm24 {

void bind(pybind11::module_& module);

}  // namespace sparsebert::nm24
