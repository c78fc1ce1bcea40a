// From a call to what the kernel is given; of its maps boxes.h says what they are of.
#pragma once

#include <wgmma/check.h>
#include <wgmma/kernel.cuh>

namespace sparsebert::wgmma {

template <typename T>
T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

// For a grid of so many blocks.
inline Arguments arguments_of(const Call& call, int blocks) {
    Arguments args{};
    args.positions = at<const uint8_t>(call.positions);
    args.bias = at<const void>(call.bias);
    args.residual = at<const void>(call.residual);
    args.x_scale = at<const float>(call.x_scale);
    args.scale = at<const float>(call.scale);
    args.output_scale = at<const float>(call.output_scale);
    args.y = at<void>(call.y);
    args.y_scale = at<float>(call.y_scale);
    args.tokens = call.problem.tokens;
    args.in_features = call.problem.in_features;
    args.out_features = call.problem.out_features;
    args.rank = call.problem.rank;
    args.part_features = call.problem.out_features / call.problem.parts;
    args.blocks = blocks;
    args.sharing = call.solution.sharing;
    args.splits = call.solution.splits;
    args.alpha = call.alpha;
    args.activation = static_cast<Activation>(call.activation);
    args.y_number = call.y_number;
    args.bias_number = call.bias_number;
    args.tiled = is_tiled(call);
    return args;
}

}  // namespace sparsebert::wgmma
