// The launch of every tile for one type of x; a source file for each type, so that they compile side by side.
#pragma once

#include <common/errors.h>
#include <cuda_runtime.h>
#include <nm24/arguments.cuh>
#include <nm24/launch.h>

#include <atomic>
#include <utility>

namespace sparsebert::nm24 {

template <Element ELEMENT, int TILE, Access ACCESS>
void launch_kernel(const Call& call) {
    constexpr Tile tile = TILES[TILE];
    const auto kernel = nm24_linear_kernel<ELEMENT, TILE, ACCESS>;
    if constexpr (tile.shared_bytes() > (48 << 10)) {
        // More than every GPU gives unasked; once a device.
        static std::atomic<uint64_t> asked{0};
        const uint64_t bit = uint64_t{1} << (call.device % 64);
        if (!(asked.load() & bit)) {
            const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
            check_cuda(cudaFuncSetAttribute(kernel, attribute, tile.shared_bytes()), "nm24_linear", "shared memory");
            if (call.device < 64) asked.fetch_or(bit);
        }
    }
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(tiles_of(call.problem, tile), call.solution.splits);
    launch.blockDim = dim3(tile.threads());
    launch.dynamicSmemBytes = tile.shared_bytes();
    launch.stream = reinterpret_cast<cudaStream_t>(call.stream);
    // Its own status: the last error may be that of an earlier call, which nobody asked for since.
    check_cuda(cudaLaunchKernelEx(&launch, kernel, arguments_of(call)), "nm24_linear", "launch");
}

template <Element ELEMENT, int TILE>
void launch_tile(const Call& call) {
    is_wide(call) ? launch_kernel<ELEMENT, TILE, Access::wide>(call)
                  : launch_kernel<ELEMENT, TILE, Access::narrow>(call);
}

template <Element ELEMENT, int... TILE_NUMBERS>
void launch_one_of(const Call& call, std::integer_sequence<int, TILE_NUMBERS...>) {
    ((call.solution.tile == TILE_NUMBERS ? launch_tile<ELEMENT, TILE_NUMBERS>(call) : void()), ...);
}

template <Element ELEMENT>
void launch_as(const Call& call) {
    launch_one_of<ELEMENT>(call, std::make_integer_sequence<int, TILE_COUNT>());
}

}  // namespace sparsebert::nm24
