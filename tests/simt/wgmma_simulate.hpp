// A call of the wgmma kernel in the machine of simt.hpp. A source for each type of x instantiates its kernels, so that they
// compile side by side.
#pragma once

#include <stdexcept>
#include <utility>

#include <wgmma/arguments.cuh>
#include <wgmma/boxes.h>

#include "simt.hpp"

namespace sparsebert::wgmma {

// In which the clusters of the next call run.
extern simt::Order order;

inline simt::Swizzle swizzle_of(Swizzle swizzle) {
    switch (swizzle) {
        case Swizzle::bytes128:
            return simt::Swizzle::bytes128;
        case Swizzle::bytes64:
            return simt::Swizzle::bytes64;
        case Swizzle::bytes32:
            return simt::Swizzle::bytes32;
        default:
            return simt::Swizzle::none;
    }
}
inline TensorMap map_of(const Box& box) {
    return {reinterpret_cast<uint8_t*>(box.address), box.element_bytes, {box.inner, box.outer}, box.row_bytes,
            {box.box_inner, box.box_outer}, swizzle_of(box.swizzle)};
}

// What the call says of its tensors, to the byte: nothing outside may be touched.
inline void describe(simt::Machine& machine, const Call& call) {
    const Problem& problem = call.problem;
    const auto add = [&](const char* name, uint64_t address, int64_t bytes, simt::Use use = simt::Input) {
        if (address) machine.buffer(name, at<const void>(address), bytes, use);
    };
    const int64_t size = size_of(problem.element), y_size = size_of(call.y_number);
    const int64_t tokens = problem.tokens, in = problem.in_features, out = problem.out_features;
    add("x", call.x, ((tokens - 1) * call.x_stride + in) * size);
    add("values", call.values, out * (problem.pattern == Pattern::nm24 ? in / 2 : in) * size);
    add("positions", call.positions, out * in / 8);
    add("t", call.t, tokens * problem.parts * problem.rank * 2);
    add("u", call.u, out * problem.rank * 2);
    add("bias", call.bias, out * size_of(call.bias_number));
    add("residual", call.residual, tokens * out * y_size);
    add("x_scale", call.x_scale, tokens * 4);
    add("scale", call.scale, out * 4);
    add("output_scale", call.output_scale, 4);
    add("y", call.y, tokens * out * y_size, simt::Output);
    add("y_scale", call.y_scale, tokens * 4, simt::Output);
}

template <Element ELEMENT, Pattern PATTERN, int TILE>
void simulate_kernel(const Call& call) {
    constexpr Tile tile = TILES[TILE];
    simt::Machine machine;
    describe(machine, call);
    const int blocks = blocks_of(call.problem, call.solution);
    const Arguments args = arguments_of(call, blocks);
    const Boxes boxes = boxes_of(call);
    const Maps maps{map_of(boxes.x), map_of(boxes.weight), map_of(boxes.y), map_of(boxes.t), map_of(boxes.u)};
    machine.launch({blocks}, THREADS, tile.shared_bytes(PATTERN),
                   [&] { wgmma_linear_kernel<ELEMENT, PATTERN, TILE>(args, maps); }, order, call.solution.cluster());
    if (!machine.written("y")) throw std::runtime_error("y is not written everywhere");
    if (call.y_scale && !machine.written("y_scale")) throw std::runtime_error("y_scale is not written everywhere");
}

template <Element ELEMENT, Pattern PATTERN, int... TILES_THERE>
void simulate_one_of(const Call& call, std::integer_sequence<int, TILES_THERE...>) {
    ((call.solution.tile == TILES_THERE ? simulate_kernel<ELEMENT, PATTERN, TILES_THERE>(call) : void()), ...);
}

template <Element ELEMENT>
void simulate_as(const Call& call) {
    constexpr auto every = std::make_integer_sequence<int, TILE_COUNT>();
    call.problem.pattern == Pattern::dense ? simulate_one_of<ELEMENT, Pattern::dense>(call, every)
                                           : simulate_one_of<ELEMENT, Pattern::nm24>(call, every);
}

}  // namespace sparsebert::wgmma
