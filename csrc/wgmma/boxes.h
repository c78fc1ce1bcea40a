// The matrices that a call's copies of tiles move, and in which boxes: plain C++, for the hardware and for tests.
#pragma once

#include <common/tensor_maps.h>
#include <wgmma/check.h>

namespace sparsebert::wgmma {

// As `Maps` in kernel.cuh. What is not there has address 0.
struct Boxes {
    Box x, weight, y, t, u;
};

inline Boxes boxes_of(const Call& call) {
    const Problem& problem = call.problem;
    const Tile& tile = TILES[call.solution.tile];
    const int64_t tokens = problem.tokens, in = problem.in_features, out = problem.out_features, rank = problem.rank;
    const bool sparse = problem.pattern == Pattern::nm24;
    const int size = size_of(problem.element), w_bytes = weight_bytes(problem.pattern);
    // Of a cluster that shares tokens each block loads a part of them.
    const int own_tokens = tile.tokens / loaders_of(tile.tokens, call.solution.sharing);
    // One row may have any stride.
    const int64_t x_row = (tokens > 1 ? call.x_stride : in) * size, kept = sparse ? in / 2 : in;
    const Swizzle w_swizzle = sparse ? Swizzle::bytes64 : Swizzle::bytes128;
    Boxes boxes{};
    boxes.x = {call.x, size, in, tokens, x_row, STAGE_BYTES / size, own_tokens, Swizzle::bytes128};
    boxes.weight = {call.values, size, kept, out, kept * size, w_bytes / size, tile.features(), w_swizzle};
    if (is_tiled(call)) boxes.y = {call.y, 2, out, tokens, out * 2, BLOCK_FEATURES, STORE_TOKENS, Swizzle::bytes128};
    if (rank > 0) {
        constexpr int RANKS = TAIL_BYTES / 2;
        const int64_t ranks = rank * problem.parts;
        boxes.t = {call.t, 2, ranks, tokens, ranks * 2, RANKS, own_tokens, Swizzle::bytes64};
        boxes.u = {call.u, 2, rank, out, rank * 2, RANKS, tile.features(), Swizzle::bytes64};
    }
    return boxes;
}

}  // namespace sparsebert::wgmma
