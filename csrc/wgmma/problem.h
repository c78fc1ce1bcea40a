// What is asked of the wgmma kernel, and what is chosen to do it: plain C++, shared by host and device code.
#pragma once

#include <common/elements.h>

namespace sparsebert::wgmma {

// Of the weight: every number, or 2 of every 4 along the inputs.
enum class Pattern : int { dense, nm24 };

// Bytes of a row of x in a stage, which a 128-byte swizzle spreads over the banks; what is kept of a row of the weight
// is half of them at 2:4.
constexpr int STAGE_BYTES = 128;
// Features of one product, a warpgroup's.
constexpr int BLOCK_FEATURES = 64;
// Warpgroups that multiply; one more, the first, only loads.
constexpr int CONSUMERS = 2;
constexpr int THREADS = 128 * (1 + CONSUMERS);
// Tokens, and features, that a warpgroup stores in one go.
constexpr int STORE_TOKENS = 64;
// Bytes of a row of t and of u, of a low-rank part, in a stage: at 2:4 a stage has room for that much of each.
constexpr int TAIL_BYTES = 64;
// Blocks of a cluster at most, which every Hopper GPU can run.
constexpr int MOST_BLOCKS = 8;

SB_BOTH constexpr int weight_bytes(Pattern pattern) { return pattern == Pattern::nm24 ? STAGE_BYTES / 2 : STAGE_BYTES; }
SB_BOTH constexpr int stage_inputs(Element element) { return STAGE_BYTES / size_of(element); }

// Blocks of a cluster that load the tokens of a tile together: all that share them, where each has whole groups of the 8
// rows that a swizzle's pattern takes; else each loads all.
SB_BOTH constexpr int loaders_of(int tokens, int sharing) { return tokens % (8 * sharing) ? 1 : sharing; }

// One way to cut the product: a thread block computes `features() x tokens` of y at a time.
struct Tile {
    int tokens;
    int blocks;      // of 64 features, a warpgroup's
    int warpgroups;  // that multiply it together: both, or one, so that they have tiles in turns

    SB_BOTH constexpr int features() const { return BLOCK_FEATURES * blocks * warpgroups; }
    SB_BOTH constexpr int bytes(Pattern pattern) const {
        return tokens * STAGE_BYTES + features() * weight_bytes(pattern);
    }
    // As many as there is room for.
    SB_BOTH constexpr int stages(Pattern pattern) const {
        const int found = (SHARED - STORES - BARRIERS) / bytes(pattern);
        return found < MOST_STAGES ? found : MOST_STAGES;
    }
    SB_BOTH constexpr int shared_bytes(Pattern pattern) const {
        return stages(pattern) * bytes(pattern) + STORES + BARRIERS;
    }
    // Whether several blocks may divide the inputs among them: where tiles are small, so that there are few of them.
    SB_BOTH constexpr bool splits() const { return warpgroups == CONSUMERS && tokens * features() <= 128 * 128; }

    static constexpr int SHARED = 227 << 10;  // of a block, on compute capability 9.0
    static constexpr int STORES = CONSUMERS * STORE_TOKENS * BLOCK_FEATURES * 2;
    static constexpr int MOST_STAGES = 8;
    static constexpr int BARRIERS = (2 * MOST_STAGES + CONSUMERS) * 8;
};

// Every tile that is compiled, few tokens first. Their sums take 32 to 128 registers a thread.
constexpr Tile TILES[] = {{64, 1, 2}, {128, 1, 2}, {128, 2, 2}, {256, 1, 2}, {128, 2, 1}};
constexpr int TILE_COUNT = sizeof(TILES) / sizeof(TILES[0]);

// Sizes of one call. `rank` is that of a low-rank part, 0 for none, and `parts` how many of them lie one under the other
// (1 unless features are those of several layers); `sms` are those of the device, 0 where that is not known.
struct Problem {
    Element element;
    Pattern pattern;
    int tokens;
    int in_features;
    int out_features;
    int rank;
    int parts;
    int sms;
};

// How it is computed: `TILES[tile]`, by clusters of blocks, of which `sharing` lie side by side along the features and
// load their tokens together, or `splits` divide the inputs of one tile among them. One of the two is 1.
struct Solution {
    int tile;
    int sharing;
    int splits;

    SB_BOTH constexpr int cluster() const { return sharing * splits; }
};

SB_BOTH constexpr int x_stages_of(const Problem& problem) {
    return ceil_div(problem.in_features, stage_inputs(problem.element));
}
// Those of a split, of the last one what is left.
SB_BOTH constexpr int stages_of_split(int stages, int splits) { return ceil_div(stages, splits); }

// Tiles that a cluster takes at a time.
inline int cluster_tiles(const Problem& problem, const Solution& solution) {
    const Tile& tile = TILES[solution.tile];
    return ceil_div(problem.out_features, tile.features() * solution.sharing) * ceil_div(problem.tokens, tile.tokens);
}

// Thread blocks: with splits as many as there are tiles and splits, else one a multiprocessor at most, each of which
// takes one tile after the other.
inline int blocks_of(const Problem& problem, const Solution& solution) {
    const int clusters = cluster_tiles(problem, solution);
    const int at_once = (problem.sms > 0 ? problem.sms : 132) / solution.cluster();
    const int most = solution.splits > 1 || clusters < at_once ? clusters : at_once;
    return (most > 0 ? most : 1) * solution.cluster();
}

}  // namespace sparsebert::wgmma
