#include <nm24/choose.h>

#include <algorithm>

namespace sparsebert::nm24 {

namespace {

// What the estimate assumes of a multiprocessor, in clocks. They only have to put solutions in a good order: `sb.tune`
// measures the first of them.
constexpr double PRODUCT_CLOCKS = 2;     // an mma.sp of 16 x 8, the four quarters working together (sm_80)
constexpr double BYTES_A_CLOCK = 32;     // from the L2
constexpr double STAGE_CLOCKS = 120;     // a barrier and what the pipeline does not hide
constexpr double BLOCK_CLOCKS = 3000;    // first loads, the transposed sums, the result
constexpr double SPLIT_CLOCKS = 1500;    // a round trip to the workspace
constexpr int THREADS_A_SM = 256;        // with as many registers as the kernels take
constexpr int SMS = 132;  // of a device that does not say
constexpr int MOST_SOLUTIONS = 12;

int sms_of(const Problem& problem) { return problem.sms ? problem.sms : SMS; }

int stages_of(const Problem& problem, const Tile& tile) {
    return ceil_div(ceil_div(problem.in_features, block_inputs(problem.element)), tile.warps_k);
}

double clocks(const Problem& problem, const Solution& solution) {
    const Tile& tile = TILES[solution.tile];
    const double products = tile.tokens / 8.0 * (tile.features() / 16.0) * 2 * tile.warps_k;
    // Weights with their metadata take 72 bytes for 128 of a row of x.
    const double bytes = (tile.features() * 72.0 + tile.tokens * 128.0) * tile.warps_k;
    const double stage = std::max(products * PRODUCT_CLOCKS, bytes / BYTES_A_CLOCK) + STAGE_CLOCKS;
    const int blocks = tiles_of(problem, tile) * solution.splits;
    const int blocks_a_sm = THREADS_A_SM / tile.threads();
    const int at_once = blocks_a_sm * sms_of(problem);
    // Blocks that share a multiprocessor share its products and loads, not their waiting.
    const int sharing = std::min(blocks_a_sm, ceil_div(blocks, sms_of(problem)));
    const int stages = ceil_div(stages_of(problem, tile), solution.splits);
    const double splitting = solution.splits > 1 ? SPLIT_CLOCKS + 150.0 * solution.splits : 0;
    return ceil_div(blocks, at_once) * (stages * stage * sharing + BLOCK_CLOCKS + splitting);
}

}  // namespace

std::vector<Solution> choose(const Problem& problem) {
    std::vector<Solution> found;
    for (int tile = 0; tile < TILE_COUNT; ++tile) {
        if (problem.shared_bytes && TILES[tile].shared_bytes() > problem.shared_bytes) continue;
        const int stages = stages_of(problem, TILES[tile]);
        for (int splits = 1; splits <= std::min(stages, MOST_SPLITS); splits *= 2) {
            // Enough blocks without splitting further.
            if (splits > 1 && tiles_of(problem, TILES[tile]) * splits > 4 * sms_of(problem)) break;
            found.push_back({tile, splits});
        }
    }
    std::stable_sort(found.begin(), found.end(), [&](const Solution& a, const Solution& b) {
        return clocks(problem, a) < clocks(problem, b);
    });
    if (found.size() > MOST_SOLUTIONS) found.resize(MOST_SOLUTIONS);
    return found;
}

}  // namespace sparsebert::nm24
