#include <common/check.h>
#include <wgmma/check.h>
#include <wgmma/choose.h>

namespace sparsebert::wgmma {

namespace {

constexpr Checker expect("wgmma_linear");

}  // namespace

bool is_tiled(const Call& call) {
    return size_of(call.y_number) == 2 && int64_t{2} * call.problem.out_features % ROW_BYTES == 0;
}

void check(const Problem& problem) {
    expect.range("element", static_cast<int>(problem.element), 0, 2);
    expect.range("pattern", static_cast<int>(problem.pattern), 0, 1);
    const bool sparse = problem.pattern == Pattern::nm24;
    expect.range("tokens", problem.tokens, 1, MOST);
    expect.range("in_features", problem.in_features, 1, MOST);
    expect.multiple("in_features", problem.in_features, ROW_BYTES / size_of(problem.element) * (sparse ? 2 : 1));
    expect.range("out_features", problem.out_features, 1, MOST);
    expect.range("rank", problem.rank, 0, sparse && problem.element != Element::int8 ? MOST : 0);
    // What follows the ranks of a part in t is the next part's: a product has those of one.
    expect.multiple("rank", problem.rank, problem.parts > 1 ? TAIL_BYTES / 4 : ROW_BYTES / 2);
    expect.range("parts", problem.parts, 1, MOST);
    expect.multiple("out_features", problem.out_features, problem.parts);
    const Tile& least = TILES[0];
    // A tile has the t of one part.
    if (problem.parts > 1)
        expect.multiple("out_features of a part", problem.out_features / problem.parts, least.features());
    expect.range("rank of all parts", int64_t{problem.rank} * problem.parts, 0, MOST);
    expect.range("sms", problem.sms, 0, MOST);
    const int64_t tiles =
        int64_t{ceil_div(problem.out_features, least.features())} * ceil_div(problem.tokens, least.tokens);
    expect.range("the number of tiles", tiles, 1, MOST / MOST_BLOCKS);
}

void check(const Problem& problem, const Solution& solution) {
    const auto [found, expected] = misfit(problem, solution);
    if (!found.empty()) expect.refuse(found, expected);
}

void check(const Call& call) {
    const Problem& problem = call.problem;
    check(problem);
    check(problem, call.solution);
    const bool integer = problem.element == Element::int8;
    const bool sparse = problem.pattern == Pattern::nm24;
    const bool low_rank = problem.rank > 0;
    expect.range("activation", call.activation, 0, 3);
    // Of floats the type of x, which has the same number.
    const int element = static_cast<int>(problem.element);
    expect.range("y_number", static_cast<int>(call.y_number), integer ? 0 : element, integer ? 3 : element);
    expect.range("bias_number", static_cast<int>(call.bias_number), 0, 2);
    const bool requantized = call.y_number == Number::int8;
    if (call.residual && size_of(call.y_number) != 2)
        expect.refuse("residual is given", "none where y is not of 16 bits");
    if (call.positions && !sparse) expect.refuse("positions are given", "none of a dense weight");

    expect.address("x", call.x, ROW_BYTES);
    if (problem.tokens > 1) {
        const int64_t size = size_of(problem.element);
        expect.range("stride of x", call.x_stride, problem.in_features, MOST_ROW_BYTES / size);
        expect.multiple("stride of x in bytes", call.x_stride * size, ROW_BYTES);
    }
    expect.address("values", call.values, ROW_BYTES);
    expect.address("positions", call.positions, 4, sparse);
    expect.address("t", call.t, ROW_BYTES, low_rank);
    expect.address("u", call.u, ROW_BYTES, low_rank);
    expect.address("y", call.y, ROW_BYTES);
    expect.address("bias", call.bias, size_of(call.bias_number), false);
    expect.address("residual", call.residual, ROW_BYTES, false);
    expect.address("x_scale", call.x_scale, 4, integer);
    expect.address("scale", call.scale, 4, integer);
    expect.address("output_scale", call.output_scale, 4, requantized);
    expect.address("y_scale", call.y_scale, 4, requantized);
}

}  // namespace sparsebert::wgmma
