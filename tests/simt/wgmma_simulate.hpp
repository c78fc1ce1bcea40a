// A call of the wgmma kernel in the machine of simt.hpp. A source for each type of x instantiates its kernels, so that they
// compile side by side.
#pragma once

#include <stdexcept>
#include <utility>

#include <wgmma/kernel.cuh>

#include "simt.hpp"

namespace sparsebert::wgmma {

struct Call {
    Element element;
    Pattern pattern;
    int tile;
    int64_t x_stride;
    uint64_t x, weight;
    Arguments args;
};

inline TensorMap map_of(uint64_t base, int element_bytes, int64_t inner, int64_t outer, int64_t row_bytes, int box_inner,
                 int box_outer, simt::Swizzle swizzle) {
    return {reinterpret_cast<uint8_t*>(base), element_bytes, {inner, outer}, row_bytes, {box_inner, box_outer}, swizzle};
}

template <Element ELEMENT, Pattern PATTERN, int TILE>
void simulate_kernel(const Call& call) {
    constexpr Tile tile = TILES[TILE];
    constexpr int size = size_of(ELEMENT), w_bytes = weight_bytes(PATTERN);
    const Arguments& args = call.args;
    const int64_t tokens = args.tokens, out = args.out_features, y_size = size_of(args.y_number);
    const int64_t kept = PATTERN == Pattern::nm24 ? args.in_features / 2 : args.in_features;
    simt::Machine machine;
    const auto add = [&](const char* name, const void* address, int64_t bytes, simt::Use use = simt::Input) {
        if (address) machine.buffer(name, address, bytes, use);
    };
    add("x", reinterpret_cast<const void*>(call.x), ((tokens - 1) * call.x_stride + args.in_features) * size);
    add("weight", reinterpret_cast<const void*>(call.weight), out * kept * size);
    add("positions", args.positions, out * args.in_features / 8);
    add("bias", args.bias, out * size_of(args.bias_number));
    add("x_scale", args.x_scale, tokens * 4);
    add("scale", args.scale, out * 4);
    add("output_scale", args.output_scale, 4);
    add("y", args.y, tokens * out * y_size, simt::Output);
    add("y_scale", args.y_scale, tokens * 4, simt::Output);
    const TensorMap x = map_of(call.x, size, args.in_features, tokens, call.x_stride * size, STAGE_BYTES / size,
                               tile.tokens, simt::Swizzle::bytes128);
    const TensorMap weight = map_of(call.weight, size, kept, out, kept * size, w_bytes / size, tile.features(),
                                    PATTERN == Pattern::nm24 ? simt::Swizzle::bytes64 : simt::Swizzle::bytes128);
    const TensorMap y = map_of(reinterpret_cast<uint64_t>(args.y), 2, out, tokens, out * 2, BLOCK_FEATURES, STORE_TOKENS,
                               simt::Swizzle::bytes128);
    machine.launch({args.blocks}, THREADS, tile.shared_bytes(PATTERN),
                   [&] { wgmma_linear_kernel<ELEMENT, PATTERN, TILE>(args, x, weight, y); });
    if (!machine.written("y")) throw std::runtime_error("y is not written everywhere");
    if (args.y_scale && !machine.written("y_scale")) throw std::runtime_error("y_scale is not written everywhere");
}

template <Element ELEMENT, Pattern PATTERN, int... TILES_THERE>
void simulate_one_of(const Call& call, std::integer_sequence<int, TILES_THERE...>) {
    ((call.tile == TILES_THERE ? simulate_kernel<ELEMENT, PATTERN, TILES_THERE>(call) : void()), ...);
}

template <Element ELEMENT>
void simulate_as(const Call& call) {
    constexpr auto every = std::make_integer_sequence<int, TILE_COUNT>();
    call.pattern == Pattern::dense ? simulate_one_of<ELEMENT, Pattern::dense>(call, every)
                                   : simulate_one_of<ELEMENT, Pattern::nm24>(call, every);
}

}  // namespace sparsebert::wgmma
