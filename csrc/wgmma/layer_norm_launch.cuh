// The launch for one type of x; a source file for each type, so that they compile side by side.
#pragma once

#include <wgmma/clusters.cuh>
#include <wgmma/layer_norm_arguments.cuh>
#include <wgmma/layer_norm_launch.h>

namespace sparsebert::wgmma {

template <Element ELEMENT, Pattern PATTERN>
void launch_norm_kernel(const NormCall& call) {
    static AtOnce at_once;
    constexpr const char* op = "wgmma_layer_norm";
    launch_in_clusters(
        op, wgmma_layer_norm_kernel<ELEMENT, PATTERN>, at_once, norm_shared_bytes(PATTERN), call.linear,
        [&](int blocks, const auto& launch) {
            const NormBoxes boxes = boxes_of(call);
            NormArguments norm = norm_arguments_of(call);
            norm.residual = map_of(op, boxes.residual);
            launch(arguments_of(call, blocks), maps_of(op, boxes.linear), norm);
        }
    );
}

template <Element ELEMENT>
void launch_layer_norm_as(const NormCall& call) {
    call.linear.problem.pattern == Pattern::dense ? launch_norm_kernel<ELEMENT, Pattern::dense>(call)
                                                  : launch_norm_kernel<ELEMENT, Pattern::nm24>(call);
}

}  // namespace sparsebert::wgmma
