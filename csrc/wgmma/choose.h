// Which tile, and which clusters of blocks, for a problem: a pure function of sizes, which needs no GPU.
#pragma once

#include <wgmma/problem.h>

#include <string>
#include <vector>

namespace sparsebert::wgmma {

// What a solution has that does not fit a checked problem, and what was expected; both empty where it fits.
struct Misfit {
    std::string found;
    std::string expected;
};
Misfit misfit(const Problem& problem, const Solution& solution);

// An estimate of one call, in clocks of a multiprocessor.
double clocks(const Problem& problem, const Solution& solution);

// The solutions worth measuring, 12 at most, the estimated best first. All fit.
std::vector<Solution> choose(const Problem& problem);

}  // namespace sparsebert::wgmma
