#include <common/check.h>
#include <nm24/check.h>

namespace sparsebert::nm24 {

namespace {

constexpr Checker expect("nm24_linear");

}  // namespace

bool is_wide(const Call& call) {
    const uint64_t bits = call.x | static_cast<uint64_t>(call.x_stride) * size_of(call.problem.element);
    return !call.columns && bits % 16 == 0;
}

void check(const Problem& problem) {
    constexpr int64_t MOST = int64_t{1} << 30;
    expect.range("element", static_cast<int>(problem.element), 0, 2);
    expect.range("tokens", problem.tokens, 1, MOST);
    expect.range("in_features", problem.in_features, 4, MOST);
    expect.multiple("in_features", problem.in_features, 4);
    expect.range("out_features", problem.out_features, 1, MOST);
    expect.range("rank", problem.rank, 0, problem.element == Element::int8 ? 0 : MOST);
    expect.multiple("rank", problem.rank, RANK_STEP);
    expect.range("sms", problem.sms, 0, MOST);
}

void check(const Solution& solution) {
    expect.range("tile", solution.tile, 0, TILE_COUNT - 1);
    expect.range("splits", solution.splits, 1, MOST_SPLITS);
}

void check(const Call& call) {
    const Problem& problem = call.problem;
    check(problem);
    const bool integer = problem.element == Element::int8;
    check(call.solution);
    const Tile& tile = TILES[call.solution.tile];
    const int64_t tiles = int64_t{ceil_div(problem.out_features, tile.features())} * ceil_div(problem.tokens, tile.tokens);
    expect.range("the number of tiles", tiles, 1, (int64_t{1} << 31) - 1);
    expect.range("activation", call.activation, 0, 3);

    expect.address("x", call.x, call.columns ? size_of(problem.element) : 4);
    expect.range("stride of x", call.x_stride, 0, int64_t{1} << 40);
    if (!call.columns) expect.multiple("stride of x in bytes", call.x_stride * size_of(problem.element), 4);
    expect.address("columns", call.columns, 4, false);
    if (integer && call.columns) expect.refuse("columns are given", "none where x is int8");
    expect.address("values", call.values, 16);
    expect.address("metadata", call.metadata, 16);
    expect.address("t", call.t, 16, problem.rank > 0);
    expect.address("u", call.u, 16, problem.rank > 0);
    expect.address("y", call.y, 16);
    expect.address("bias", call.bias, size_of(call.bias_number), false);
    expect.address("residual", call.residual, size_of(call.y_number), false);
    expect.address("x_scale", call.x_scale, 4, integer);
    expect.address("scale", call.scale, 4, integer);
    const bool requantized = call.y_number == Number::int8;
    if (requantized && !integer) expect.refuse("y is int8", "a float, as x is");
    if (call.bias_number == Number::int8) expect.refuse("bias is int8", "a float");
    if (requantized && call.residual) expect.refuse("residual is given", "none where y is int8");
    expect.address("output_scale", call.output_scale, 4, requantized);
    expect.address("y_scale", call.y_scale, 4, requantized);
    expect.address("partial", call.partial, 16, call.solution.splits > 1);
    expect.address("arrivals", call.arrivals, 4, call.solution.splits > 1);
}

}  // namespace sparsebert::nm24
