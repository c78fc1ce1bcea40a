// What is asked of the 2:4 kernel, and what is chosen to do it: plain C++, shared by host and device code.
#pragma once

#include <common/elements.h>

namespace sparsebert::nm24 {

// A block of the packed weight: this many features, and inputs that take this many bytes of a row of x.
constexpr int BLOCK_FEATURES = 64;
constexpr int BLOCK_BYTES = 128;
// A rank's tail goes in steps of this many.
constexpr int RANK_STEP = 16;

SB_BOTH constexpr int block_inputs(Element element) { return BLOCK_BYTES / size_of(element); }

// One way to cut the product: a thread block computes `features() x tokens` of y by warps of 64 features each;
// `warps_k` of them share each piece of y and every stage's inputs. It finishes y in parts of 128 features at most, whose
// sums fit into shared memory.
struct Tile {
    int tokens;
    int warps_m;
    int warps_n;
    int warps_k;
    int stages;

    SB_BOTH constexpr int features() const { return BLOCK_FEATURES * warps_m; }
    SB_BOTH constexpr int threads() const { return 32 * warps_m * warps_n * warps_k; }
    SB_BOTH constexpr int stage_bytes() const { return tokens * warps_k * BLOCK_BYTES; }
    SB_BOTH constexpr int parts() const { return (warps_m + 1) / 2; }
    SB_BOTH constexpr int part_features() const { return features() / parts(); }
    // The sums of a part, [tokens][features + 4], four bytes each: the 4 keep a warp's stores in different banks.
    SB_BOTH constexpr int sums_pitch() const { return part_features() + 4; }
    SB_BOTH constexpr int shared_bytes() const {
        const int sums = tokens * sums_pitch() * 4;
        return sums > stages * stage_bytes() ? sums : stages * stage_bytes();
    }
};

// Every tile that is compiled, for each Element: few tokens first. None needs more shared memory than sm_86 has (99 KiB).
constexpr Tile TILES[] = {
    {8, 1, 1, 4, 4},  {16, 1, 1, 4, 4},  {32, 1, 1, 4, 3},  {32, 2, 1, 2, 4},
    {64, 2, 2, 1, 4}, {128, 2, 2, 1, 4}, {128, 4, 2, 1, 4},
};
constexpr int TILE_COUNT = sizeof(TILES) / sizeof(TILES[0]);
// Most parts that the inputs are divided into.
constexpr int MOST_SPLITS = 16;

// Sizes of one call. `rank` is that of a low-rank part, 0 for none; `sms` and `shared_bytes` (of a block) are those of
// the device, 0 where that is not known.
struct Problem {
    Element element;
    int tokens;
    int in_features;
    int out_features;
    int rank;
    int sms;
    int shared_bytes;
};

// How it is computed: `TILES[tile]`, and the inputs divided among `splits` thread blocks.
struct Solution {
    int tile;
    int splits;
};

inline int tiles_of(const Problem& problem, const Tile& tile) {
    return ceil_div(problem.out_features, tile.features()) * ceil_div(problem.tokens, tile.tokens);
}

// Bytes of the workspace that the partial sums of all splits take, and the counters of arrivals, one for each part of
// a tile (uint32, zeroed).
inline int64_t partial_bytes(const Problem& problem, const Solution& solution) {
    const Tile& tile = TILES[solution.tile];
    if (solution.splits == 1) return 0;
    return int64_t{4} * tiles_of(problem, tile) * solution.splits * tile.tokens * tile.features();
}
inline int counters(const Problem& problem, const Solution& solution) {
    return solution.splits == 1 ? 0 : tiles_of(problem, TILES[solution.tile]) * TILES[solution.tile].parts();
}

}  // namespace sparsebert::nm24
