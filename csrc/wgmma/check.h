// One call of the wgmma kernel as it comes from Python, and whether its parts fit.
#pragma once

#include <wgmma/problem.h>

namespace sparsebert::wgmma {

// Addresses in device memory; 0 for what is not there. See `Arguments` in kernel.cuh for shapes.
struct Call {
    Problem problem;
    Solution solution;
    uint64_t x;
    int64_t x_stride;  // elements
    uint64_t values, positions, t, u, bias, residual, x_scale, scale, output_scale, y, y_scale;
    Number y_number;
    Number bias_number;
    int activation;
    float alpha;
    int device;
    uint64_t stream;
};

// std::invalid_argument, worded `wgmma_linear: <tensor> ..., expected ...`, where something does not fit.
void check(const Problem& problem);
void check(const Problem& problem, const Solution& solution);
void check(const Call& call);

// Whether y can be stored by copies of tiles: 16-bit floats, its rows at multiples of 16 bytes.
bool is_tiled(const Call& call);

}  // namespace sparsebert::wgmma
