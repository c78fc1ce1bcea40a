// One call of the wgmma kernel as it comes from Python, and whether its parts fit.
#pragma once

#include <common/operands.h>
#include <wgmma/problem.h>

namespace sparsebert::wgmma {

// Of a size, and of tiles with their splits: the kernels count in int.
constexpr int64_t MOST = int64_t{1} << 30;
// Rows of what copies of tiles move begin at multiples of these, and lie no further apart than this many.
constexpr int64_t ROW_BYTES = 16;
constexpr int64_t MOST_ROW_BYTES = (int64_t{1} << 40) - 1;

// Shapes are those of `Arguments` in main_loop.cuh.
struct Call : Operands {
    Problem problem;
    Solution solution;
    uint64_t positions;
};

// std::invalid_argument, worded `wgmma_linear: <tensor> ..., expected ...`, where something does not fit.
void check(const Problem& problem);
void check(const Problem& problem, const Solution& solution);
void check(const Call& call);

// Whether y can be stored by copies of tiles: 16-bit floats, its rows at multiples of 16 bytes.
bool is_tiled(const Call& call);

}  // namespace sparsebert::wgmma
