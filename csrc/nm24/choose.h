// Which tile and how many splits for a problem: a pure function of sizes, which needs no GPU.
#pragma once

#include <nm24/problem.h>

#include <vector>

namespace sparsebert::nm24 {

// Every solution worth measuring, the estimated best first; none needs more shared memory than the problem's device has.
std::vector<Solution> choose(const Problem& problem);

}  // namespace sparsebert::nm24
