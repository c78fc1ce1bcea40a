#include <common/errors.h>
#include <nm24/check.h>

#include <string>

namespace sparsebert::nm24 {

namespace {

[[noreturn]] void refuse(const std::string& found, const std::string& expected) {
    sparsebert::refuse("nm24_linear", found, expected);
}

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most)
        refuse(std::string(name) + " is " + std::to_string(value), std::to_string(least) + " to " + std::to_string(most));
}

void check_multiple(const char* name, int64_t value, int64_t of) {
    if (value % of) refuse(std::string(name) + " is " + std::to_string(value), "a multiple of " + std::to_string(of));
}

void check_address(const char* name, uint64_t address, uint64_t alignment, bool needed = true) {
    if (needed && !address) refuse(std::string(name) + " is missing", "a tensor on the device");
    if (address % alignment) {
        refuse(
            std::string(name) + " begins " + std::to_string(address % alignment) + " bytes past a multiple of " +
                std::to_string(alignment),
            "that multiple"
        );
    }
}

}  // namespace

bool is_wide(const Call& call) {
    const uint64_t bits = call.x | static_cast<uint64_t>(call.x_stride) * size_of(call.problem.element);
    return !call.columns && bits % 16 == 0;
}

void check(const Problem& problem) {
    constexpr int64_t MOST = int64_t{1} << 30;
    check_range("element", static_cast<int>(problem.element), 0, 2);
    check_range("tokens", problem.tokens, 1, MOST);
    check_range("in_features", problem.in_features, 4, MOST);
    check_multiple("in_features", problem.in_features, 4);
    check_range("out_features", problem.out_features, 1, MOST);
    check_range("rank", problem.rank, 0, problem.element == Element::int8 ? 0 : MOST);
    check_multiple("rank", problem.rank, RANK_STEP);
    check_range("sms", problem.sms, 0, MOST);
}

void check(const Solution& solution) {
    check_range("tile", solution.tile, 0, TILE_COUNT - 1);
    check_range("splits", solution.splits, 1, MOST_SPLITS);
}

void check(const Call& call) {
    const Problem& problem = call.problem;
    check(problem);
    const bool integer = problem.element == Element::int8;
    check(call.solution);
    const Tile& tile = TILES[call.solution.tile];
    const int64_t tiles = int64_t{ceil_div(problem.out_features, tile.features())} * ceil_div(problem.tokens, tile.tokens);
    check_range("the number of tiles", tiles, 1, (int64_t{1} << 31) - 1);
    check_range("activation", call.activation, 0, 3);

    check_address("x", call.x, call.columns ? size_of(problem.element) : 4);
    check_range("stride of x", call.x_stride, 0, int64_t{1} << 40);
    if (!call.columns) check_multiple("stride of x in bytes", call.x_stride * size_of(problem.element), 4);
    check_address("columns", call.columns, 4, false);
    if (integer && call.columns) refuse("columns are given", "none where x is int8");
    check_address("values", call.values, 16);
    check_address("metadata", call.metadata, 16);
    check_address("t", call.t, 16, problem.rank > 0);
    check_address("u", call.u, 16, problem.rank > 0);
    check_address("y", call.y, 16);
    check_address("bias", call.bias, size_of(call.bias_number), false);
    check_address("residual", call.residual, size_of(call.y_number), false);
    check_address("x_scale", call.x_scale, 4, integer);
    check_address("scale", call.scale, 4, integer);
    const bool requantized = call.y_number == Number::int8;
    if (requantized && !integer) refuse("y is int8", "a float, as x is");
    if (call.bias_number == Number::int8) refuse("bias is int8", "a float");
    if (requantized && call.residual) refuse("residual is given", "none where y is int8");
    check_address("output_scale", call.output_scale, 4, requantized);
    check_address("y_scale", call.y_scale, 4, requantized);
    check_address("partial", call.partial, 16, call.solution.splits > 1);
    check_address("arrivals", call.arrivals, 4, call.solution.splits > 1);
}

}  // namespace sparsebert::nm24
