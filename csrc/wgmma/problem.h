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

SB_BOTH constexpr int weight_bytes(Pattern pattern) { return pattern == Pattern::nm24 ? STAGE_BYTES / 2 : STAGE_BYTES; }
SB_BOTH constexpr int stage_inputs(Element element) { return STAGE_BYTES / size_of(element); }

// One way to cut the product: a thread block computes `features() x tokens` of y at a time.
struct Tile {
    int tokens;
    int blocks;  // of 64 features, a warpgroup's

    SB_BOTH constexpr int features() const { return BLOCK_FEATURES * blocks * CONSUMERS; }
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

    static constexpr int SHARED = 227 << 10;  // of a block, on compute capability 9.0
    static constexpr int STORES = CONSUMERS * STORE_TOKENS * BLOCK_FEATURES * 2;
    static constexpr int MOST_STAGES = 8;
    static constexpr int BARRIERS = 2 * MOST_STAGES * 8;
};

// Every tile that is compiled, few tokens first. Their sums take 32 to 128 registers a thread.
constexpr Tile TILES[] = {{64, 1}, {128, 1}, {128, 2}, {256, 1}};
constexpr int TILE_COUNT = sizeof(TILES) / sizeof(TILES[0]);

}  // namespace sparsebert::wgmma
