// From a call to what the kernel is given; of its maps boxes.h says what they are of.
#pragma once

#include <wgmma/check.h>
#include <wgmma/kernel.cuh>

namespace sparsebert::wgmma {

// For a grid of so many blocks.
inline Arguments arguments_of(const Call& call, int blocks) {
    Arguments args{epilogue_of(call)};
    args.positions = at<const uint8_t>(call.positions);
    args.rank = call.problem.rank;
    args.part_features = call.problem.out_features / call.problem.parts;
    args.blocks = blocks;
    args.sharing = call.solution.sharing;
    args.splits = call.solution.splits;
    args.tiled = is_tiled(call);
    return args;
}

}  // namespace sparsebert::wgmma
