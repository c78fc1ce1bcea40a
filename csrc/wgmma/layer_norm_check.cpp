#include <common/check.h>
#include <wgmma/layer_norm_call.h>

namespace sparsebert::wgmma {

namespace {

constexpr Checker expect("wgmma_layer_norm");

}  // namespace

void check(const NormCall& call) {
    const Call& linear = call.linear;
    const Problem& problem = linear.problem;
    expect.range("element", static_cast<int>(problem.element), 0, 2);
    expect.range("pattern", static_cast<int>(problem.pattern), 0, 1);
    const bool sparse = problem.pattern == Pattern::nm24, integer = problem.element == Element::int8;
    const int64_t size = size_of(problem.element);
    expect.range("tokens", problem.tokens, 1, MOST);
    expect.range("in_features", problem.in_features, 1, MOST);
    expect.multiple("in_features", problem.in_features, ROW_BYTES / size * (sparse ? 2 : 1));
    constexpr int FEATURES = TILES[NORM_TILE].features();
    expect.range("out_features", problem.out_features, 1, FEATURES * MOST_BLOCKS);
    expect.multiple("out_features", problem.out_features, FEATURES);
    expect.range("rank", problem.rank, 0, sparse && !integer ? MOST : 0);
    expect.multiple("rank", problem.rank, ROW_BYTES / 2);
    // Of floats the type of x, which has the same number.
    const int element = static_cast<int>(problem.element);
    expect.range("y_number", static_cast<int>(linear.y_number), integer ? 0 : element, integer ? 1 : element);
    expect.range("bias_number", static_cast<int>(linear.bias_number), 0, 2);
    expect.range("gamma_number", static_cast<int>(call.gamma_number), 0, 2);
    expect.range("beta_number", static_cast<int>(call.beta_number), 0, 2);
    if (!(call.eps >= 0)) expect.refuse("eps is " + std::to_string(call.eps), "a number of at least 0");
    if (linear.positions && !sparse) expect.refuse("positions are given", "none of a dense weight");
    if (call.input_scale && !call.q) expect.refuse("input_scale is given", "none where there is no q");

    expect.address("x", linear.x, ROW_BYTES);
    if (problem.tokens > 1) {
        expect.range("stride of x", linear.x_stride, problem.in_features, MOST_ROW_BYTES / size);
        expect.multiple("stride of x in bytes", linear.x_stride * size, ROW_BYTES);
    }
    expect.address("values", linear.values, ROW_BYTES);
    expect.address("positions", linear.positions, 4, sparse);
    expect.address("t", linear.t, ROW_BYTES, problem.rank > 0);
    expect.address("u", linear.u, ROW_BYTES, problem.rank > 0);
    expect.address("bias", linear.bias, size_of(linear.bias_number), false);
    expect.address("residual", linear.residual, ROW_BYTES, false);
    expect.address("x_scale", linear.x_scale, 4, integer);
    expect.address("scale", linear.scale, 4, integer);
    expect.address("gamma", call.gamma, size_of(call.gamma_number));
    expect.address("beta", call.beta, size_of(call.beta_number));
    expect.address("y", linear.y, ROW_BYTES);
    expect.address("q", call.q, ROW_BYTES, false);
    expect.address("q_scale", call.q_scale, 4, call.q != 0);
    expect.address("input_scale", call.input_scale, 4, false);
}

}  // namespace sparsebert::wgmma
