// One call of the 2:4 kernel as it comes from Python, and whether its parts fit.
#pragma once

#include <nm24/problem.h>

namespace sparsebert::nm24 {

// Addresses in device memory; 0 for what is not there. See `Arguments` in kernel.cuh for shapes.
struct Call {
    Problem problem;
    Solution solution;
    uint64_t x;
    int64_t x_stride;  // elements
    uint64_t values, metadata, columns, t, u, bias, residual, x_scale, scale, output_scale, y, y_scale, partial, arrivals;
    Number y_number;
    Number bias_number;
    int activation;
    float alpha;
    int device;
    uint64_t stream;
};

// std::invalid_argument, worded `nm24_linear: <tensor> ..., expected ...`, where something does not fit.
void check(const Problem& problem);
void check(const Solution& solution);
void check(const Call& call);

// Whether every row of x begins at a multiple of 16 bytes and is read in one piece.
bool is_wide(const Call& call);

}  // namespace sparsebert::nm24
