// A call of the 2:4 kernel in the machine of simt.hpp. A source for each type of x instantiates its kernels, so that they
// compile side by side.
#pragma once

#include <nm24/arguments.cuh>
#include <stdexcept>
#include <utility>

#include "simt.hpp"

namespace sparsebert::nm24 {

// In which the blocks of the next call run.
extern simt::Order order;

inline const void* pointer(uint64_t address) { return reinterpret_cast<const void*>(address); }

// What the call says of its tensors, to the byte: nothing outside may be touched.
inline void describe(simt::Machine& machine, const Call& call) {
    const Problem& problem = call.problem;
    const auto add = [&](const char* name, uint64_t address, int64_t bytes, simt::Use use = simt::Input) {
        if (address) machine.buffer(name, pointer(address), bytes, use);
    };
    const int64_t size = size_of(problem.element), tokens = problem.tokens, out = problem.out_features;
    const int64_t feature_blocks = ceil_div(problem.out_features, BLOCK_FEATURES);
    const int64_t input_blocks = ceil_div(problem.in_features, block_inputs(problem.element));
    // With columns a row of x is as long as its stride.
    const int64_t row = call.columns ? call.x_stride : problem.in_features;
    add("x", call.x, ((tokens - 1) * call.x_stride + row) * size);
    const int64_t kept = BLOCK_FEATURES * BLOCK_BYTES / 2;
    add("values", call.values, feature_blocks * input_blocks * kept);
    add("metadata", call.metadata, feature_blocks * input_blocks * kept / size / 4);
    add("columns", call.columns, problem.in_features * 4);
    add("t", call.t, tokens * problem.rank * 2);
    add("u", call.u, feature_blocks * BLOCK_FEATURES * problem.rank * 2);
    add("bias", call.bias, out * size_of(call.bias_number));
    add("residual", call.residual, tokens * out * size_of(call.y_number));
    add("x_scale", call.x_scale, tokens * 4);
    add("scale", call.scale, out * 4);
    add("output_scale", call.output_scale, 4);
    add("y", call.y, tokens * out * size_of(call.y_number), simt::Output);
    add("y_scale", call.y_scale, tokens * 4, simt::Output);
    add("partial", call.partial, partial_bytes(problem, call.solution), simt::Scratch);
    add("arrivals", call.arrivals, counters(problem, call.solution) * 4, simt::InOut);
}

template <Element ELEMENT, int TILE, Access ACCESS>
void simulate_kernel(const Call& call) {
    constexpr Tile tile = TILES[TILE];
    simt::Machine machine;
    describe(machine, call);
    const Arguments args = arguments_of(call);
    const simt::Grid grid{tiles_of(call.problem, tile), call.solution.splits};
    machine.launch(grid, tile.threads(), tile.shared_bytes(), [&] { nm24_linear_kernel<ELEMENT, TILE, ACCESS>(args); }, order);
    if (!machine.written("y")) throw std::runtime_error("y is not written everywhere");
    if (call.y_scale && !machine.written("y_scale")) throw std::runtime_error("y_scale is not written everywhere");
}

template <Element ELEMENT, int... TILES_THERE>
void simulate_one_of(const Call& call, std::integer_sequence<int, TILES_THERE...>) {
    const bool wide = is_wide(call);
    ((call.solution.tile != TILES_THERE ? void()
      : wide                             ? simulate_kernel<ELEMENT, TILES_THERE, Access::wide>(call)
                                         : simulate_kernel<ELEMENT, TILES_THERE, Access::narrow>(call)),
     ...);
}

template <Element ELEMENT>
void simulate_as(const Call& call) {
    simulate_one_of<ELEMENT>(call, std::make_integer_sequence<int, TILE_COUNT>());
}

}  // namespace sparsebert::nm24
