// Runs a checked call: one kernel on its stream.
#pragma once

#include <wgmma/layer_norm_call.h>

namespace sparsebert::wgmma {

// std::runtime_error where the device is not Hopper, or with CUDA's text where the launch fails.
void launch_layer_norm(const NormCall& call);

template <Element ELEMENT>
void launch_layer_norm_as(const NormCall& call);

}  // namespace sparsebert::wgmma
