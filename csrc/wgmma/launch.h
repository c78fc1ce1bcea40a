// Runs a checked call: one kernel on its stream.
#pragma once

#include <wgmma/check.h>

namespace sparsebert::wgmma {

// std::runtime_error where the device is not Hopper, or with CUDA's text where the launch fails.
void launch(const Call& call);

template <Element ELEMENT>
void launch_as(const Call& call);

}  // namespace sparsebert::wgmma
