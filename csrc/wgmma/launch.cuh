// The launch of every tile for one type of x; a source file for each type, so that they compile side by side.
#pragma once

#include <wgmma/arguments.cuh>
#include <wgmma/clusters.cuh>
#include <wgmma/launch.h>

#include <utility>

namespace sparsebert::wgmma {

template <Element ELEMENT, Pattern PATTERN, int TILE>
void launch_kernel(const Call& call) {
    static AtOnce at_once;
    constexpr const char* op = "wgmma_linear";
    launch_in_clusters(
        op, wgmma_linear_kernel<ELEMENT, PATTERN, TILE>, at_once, TILES[TILE].shared_bytes(PATTERN), call,
        [&](int blocks, const auto& launch) { launch(arguments_of(call, blocks), maps_of(op, boxes_of(call))); }
    );
}

template <Element ELEMENT, int TILE>
void launch_tile(const Call& call) {
    call.problem.pattern == Pattern::dense ? launch_kernel<ELEMENT, Pattern::dense, TILE>(call)
                                           : launch_kernel<ELEMENT, Pattern::nm24, TILE>(call);
}

template <Element ELEMENT, int... TILE_NUMBERS>
void launch_one_of(const Call& call, std::integer_sequence<int, TILE_NUMBERS...>) {
    ((call.solution.tile == TILE_NUMBERS ? launch_tile<ELEMENT, TILE_NUMBERS>(call) : void()), ...);
}

template <Element ELEMENT>
void launch_as(const Call& call) {
    launch_one_of<ELEMENT>(call, std::make_integer_sequence<int, TILE_COUNT>());
}

}  // namespace sparsebert::wgmma
