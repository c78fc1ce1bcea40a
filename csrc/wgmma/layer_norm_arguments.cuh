// From a call to what the kernel that normalizes is given; of its maps layer_norm_call.h says what they are of.
#pragma once

#include <wgmma/arguments.cuh>
#include <wgmma/layer_norm.cuh>

namespace sparsebert::wgmma {

// For a grid of so many blocks. The residual comes by copies of tiles.
inline Arguments arguments_of(const NormCall& call, int blocks) {
    Arguments args = arguments_of(call.linear, blocks);
    args.residual = nullptr;
    return args;
}

// Without the residual's map.
inline NormArguments norm_arguments_of(const NormCall& call) {
    NormArguments args{};
    args.gamma = at<const void>(call.gamma);
    args.beta = at<const void>(call.beta);
    args.q = at<int8_t>(call.q);
    args.q_scale = at<float>(call.q_scale);
    args.input_scale = at<const float>(call.input_scale);
    args.eps = call.eps;
    args.gamma_number = call.gamma_number;
    args.beta_number = call.beta_number;
    args.has_residual = call.linear.residual != 0;
    return args;
}

}  // namespace sparsebert::wgmma
