// What the calls of all products come with from Python.
#pragma once

#include <common/elements.h>

namespace sparsebert {

// Addresses in device memory, 0 for what is not there: of what a kernel has for itself, its own call tells. Kernels say
// in which order they want their weights; shapes of the rest are those of `Epilogue` in arguments.cuh.
struct Operands {
    uint64_t x;
    int64_t x_stride;  // elements
    uint64_t values, t, u, bias, residual, x_scale, scale, output_scale, y, y_scale;
    Number y_number;
    Number bias_number;
    int activation;
    float alpha;
    int device;
    uint64_t stream;
};

}  // namespace sparsebert
