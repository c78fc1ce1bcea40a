// One call of the 2:4 kernel as it comes from Python, and whether its parts fit.
#pragma once

#include <common/operands.h>
#include <nm24/problem.h>

namespace sparsebert::nm24 {

// Shapes are those of `Arguments` in kernel.cuh.
struct Call : Operands {
    Problem problem;
    Solution solution;
    uint64_t metadata, columns, partial, arrivals;
};

// std::invalid_argument, worded `nm24_linear: <tensor> ..., expected ...`, where something does not fit.
void check(const Problem& problem);
void check(const Solution& solution);
void check(const Call& call);

// Whether every row of x begins at a multiple of 16 bytes and is read in one piece.
bool is_wide(const Call& call);

}  // namespace sparsebert::nm24
