#include <wgmma/choose.h>

#include <algorithm>

namespace sparsebert::wgmma {

namespace {

constexpr int MOST_SHARING = 4;
constexpr int MOST_SOLUTIONS = 12;
constexpr int SMS = 132;  // of a device that does not say

// A block of a cluster loads, or finishes, tokens in eights: those of a swizzle's pattern, and of a product's columns.
constexpr bool tokens_divide() {
    for (const Tile& tile : TILES) {
        if (tile.tokens % (8 * MOST_BLOCKS)) return false;
    }
    return true;
}
static_assert(MOST_SHARING <= MOST_BLOCKS && tokens_divide(), "every cluster divides the tokens of every tile");

// What the estimate assumes of a multiprocessor, in clocks. Nothing of it is measured here, and it only has to put
// solutions in a good order: `sb.tune` measures the first of them.
//
// Bytes of what is kept of the weight, times tokens: 2048 products of two bytes a clock, twice as many of one byte, and
// the same of a 2:4 weight, for which the tensor cores skip the zeros.
constexpr double PRODUCT_BYTES_A_CLOCK = 4096;
constexpr double SHARED_BYTES_A_CLOCK = 128;  // what copies write and what products read, together
constexpr double L2_BYTES_A_CLOCK = 26;       // 5.5 to 6 TB/s for all multiprocessors
constexpr double STAGE_CLOCKS = 40;           // a barrier, and what the products under way do not hide
constexpr double TILE_CLOCKS = 800;           // from the end of the last products to that of the first rows of y
constexpr double RESULT_BYTES_A_CLOCK = 20;   // of y, with what is computed for each number
constexpr double SPLIT_CLOCKS = 1500;         // blocks of a cluster wait for each other, twice
constexpr double REMOTE_BYTES_A_CLOCK = 16;   // from the shared memory of other blocks
constexpr double LAUNCH_CLOCKS = 4000;        // until the first stage is there

// Of a stage that multiplies x_bytes of each token's row by w_bytes of each feature's, which come with their positions.
double stage_clocks(const Problem& problem, const Solution& solution, int x_bytes, int w_bytes, int position_bytes) {
    const Tile& tile = TILES[solution.tile];
    const double x = double{1} * tile.tokens * x_bytes, w = double{1} * tile.features() * w_bytes;
    const double products = tile.tokens * w / PRODUCT_BYTES_A_CLOCK;
    // A product of 64 features reads its own rows of W, and all of x.
    const double reads = w + x * (tile.features() / BLOCK_FEATURES);
    const double shared = (x + w + reads) / SHARED_BYTES_A_CLOCK;
    // Tokens that are not there are zeros from nowhere.
    const double x_there = double{1} * std::min(tile.tokens, problem.tokens) * x_bytes;
    const double l2 = (x_there / solution.sharing + w + tile.features() * position_bytes) / L2_BYTES_A_CLOCK;
    return std::max({products, shared, l2}) + STAGE_CLOCKS;
}

}  // namespace

Misfit misfit(const Problem& problem, const Solution& solution) {
    const auto [number, sharing, splits] = solution;
    const auto is = [](const char* name, int value) { return std::string(name) + " is " + std::to_string(value); };
    if (number < 0 || number >= TILE_COUNT) return {is("tile", number), "0 to " + std::to_string(TILE_COUNT - 1)};
    if (sharing != 1 && sharing != 2 && sharing != MOST_SHARING) return {is("sharing", sharing), "1, 2 or 4"};
    if (splits != 1 && splits != 2 && splits != 4 && splits != MOST_BLOCKS)
        return {is("splits", splits), "1, 2, 4 or 8"};
    if (sharing > 1 && splits > 1) return {is("sharing", sharing) + " and " + is("splits", splits), "1 of one of them"};
    const Tile& tile = TILES[number];
    if (splits > 1 && !tile.splits()) return {is("splits", splits), "1 for tile " + std::to_string(number)};
    const int stages = x_stages_of(problem);
    if ((splits - 1) * stages_of_split(stages, splits) >= stages)
        return {is("splits", splits), "a stage of inputs for each, of " + std::to_string(stages)};
    // Blocks of a cluster load the same t.
    const int features = tile.features() * sharing, of_part = problem.out_features / problem.parts;
    if (problem.parts > 1 && of_part % features)
        return {is("the width of a cluster in features", features), "a divisor of a part's " + std::to_string(of_part)};
    return {};
}

double clocks(const Problem& problem, const Solution& solution) {
    const Tile& tile = TILES[solution.tile];
    const int splits = solution.splits, w_bytes = weight_bytes(problem.pattern);
    const int position_bytes = problem.pattern == Pattern::nm24 ? stage_inputs(problem.element) / 8 : 0;
    const double stage = stage_clocks(problem, solution, STAGE_BYTES, w_bytes, position_bytes);
    const double tail_stage = stage_clocks(problem, solution, TAIL_BYTES, TAIL_BYTES, 0);
    const int stages = x_stages_of(problem), own = stages_of_split(stages, splits);
    // The last split has the fewest stages of x, and all of t.
    const double last = (stages - own * (splits - 1)) * stage + ceil_div(problem.rank, TAIL_BYTES / 2) * tail_stage;
    const double numbers = double{1} * tile.tokens * tile.features();
    // A block reads the sums of all splits, of its share of the tokens.
    const double splitting = splits > 1 ? SPLIT_CLOCKS + numbers * 4 / REMOTE_BYTES_A_CLOCK : 0;
    const double products = std::max(own * stage, last) + splitting;
    // One warpgroup takes as much longer as there are more of them.
    const int turns = CONSUMERS / tile.warpgroups;
    const double result = numbers / splits * 2 / RESULT_BYTES_A_CLOCK * turns + TILE_CLOCKS;
    // With tiles in turns, one is finished while the next is multiplied.
    const double round = std::max(products, (products + result) / turns);
    const int at_once = std::max(1, (problem.sms ? problem.sms : SMS) / solution.cluster());
    const int rounds = ceil_div(cluster_tiles(problem, solution), at_once);
    return LAUNCH_CLOCKS + (rounds - 1) * round + products + result;
}

std::vector<Solution> choose(const Problem& problem) {
    std::vector<Solution> found;
    for (int tile = 0; tile < TILE_COUNT; ++tile) {
        for (int sharing = 1; sharing <= MOST_SHARING; sharing *= 2) {
            for (int splits = 1; splits <= MOST_BLOCKS; splits *= 2) {
                const Solution solution{tile, sharing, splits};
                if (misfit(problem, solution).found.empty()) found.push_back(solution);
            }
        }
    }
    std::stable_sort(found.begin(), found.end(), [&](const Solution& a, const Solution& b) {
        return clocks(problem, a) < clocks(problem, b);
    });
    if (found.size() > MOST_SOLUTIONS) found.resize(MOST_SOLUTIONS);
    return found;
}

}  // namespace sparsebert::wgmma
