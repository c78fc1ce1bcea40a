// One call of the wgmma kernel that normalizes, as it comes from Python, and whether its parts fit.
#pragma once

#include <wgmma/boxes.h>

namespace sparsebert::wgmma {

// A row's features are those of a cluster, each of whose blocks has a tile of them.
constexpr int NORM_TILE = 0;

// What the kernel has in shared memory after that of its tile: where each part begins, in bytes.
struct NormShared {
    static constexpr int LANES = 32;  // each has two tokens of a tile
    static constexpr int WARPS = 4 * CONSUMERS;
    static constexpr int OF_WARP = LANES * 16;

    static constexpr int EXCHANGES = 0;  // two, a place for each block of the cluster in each of them
    static constexpr int OF_EXCHANGE = MOST_BLOCKS * OF_WARP;
    static constexpr int PARTS = EXCHANGES + 2 * OF_EXCHANGE;  // of each warp, for all of the block
    static constexpr int TOKENS = PARTS + WARPS * OF_WARP;     // of each warp, for itself
    static constexpr int MAXIMA = TOKENS + WARPS * OF_WARP;    // of each warpgroup
    static constexpr int BARRIERS = MAXIMA + CONSUMERS * STORE_TOKENS * 4;
    static constexpr int BYTES = BARRIERS + (2 + CONSUMERS) * 8;
};

constexpr int norm_shared_bytes(Pattern pattern) { return TILES[NORM_TILE].shared_bytes(pattern) + NormShared::BYTES; }

static_assert(TILES[NORM_TILE].tokens == STORE_TOKENS && STORE_TOKENS == 2 * NormShared::LANES, "what a lane has");
static_assert(TILES[NORM_TILE].blocks == 1, "what a warpgroup stores in one go");
static_assert(MOST_BLOCKS <= NormShared::WARPS, "a warp sends to each block");
static_assert(norm_shared_bytes(Pattern::dense) <= Tile::SHARED && norm_shared_bytes(Pattern::nm24) <= Tile::SHARED,
              "what a block may have");

// Addresses as in Call, whose solution is that of norm_solution(), and which has no activation; its residual is added
// before rows are normalized.
struct NormCall {
    Call linear;
    uint64_t gamma, beta, q, q_scale, input_scale;
    Number gamma_number, beta_number;
    float eps;
};

inline Solution norm_solution(const Problem& problem) {
    return {NORM_TILE, problem.out_features / TILES[NORM_TILE].features(), 1};
}

// std::invalid_argument, worded `wgmma_layer_norm: <tensor> ..., expected ...`, where something does not fit.
void check(const NormCall& call);

struct NormBoxes {
    Boxes linear;
    Box residual;  // address 0 where there is none
};

inline NormBoxes boxes_of(const NormCall& call) {
    NormBoxes boxes{boxes_of(call.linear), {}};
    if (call.linear.residual) {
        boxes.residual = boxes.linear.y;
        boxes.residual.address = call.linear.residual;
    }
    return boxes;
}

}  // namespace sparsebert::wgmma
