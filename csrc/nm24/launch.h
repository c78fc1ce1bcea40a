// Runs a checked call: one kernel on its stream.
#pragma once

#include <nm24/check.h>

namespace sparsebert::nm24 {

// std::runtime_error with CUDA's text where the launch fails.
void launch(const Call& call);

template <Element ELEMENT>
void launch_as(const Call& call);

}  // namespace sparsebert::nm24
