// Types of numbers, and what host and device code both do with sizes: plain C++.
#pragma once

#include <cstdint>

// A function that host and device code call.
#ifdef __CUDACC__
#define SB_BOTH __host__ __device__
#else
#define SB_BOTH
#endif

namespace sparsebert {

// Type of x and of the weight.
enum class Element : int { half, bfloat16, int8 };
// Type of y, or of another vector of floats.
enum class Number : int { half, bfloat16, float32, int8 };

SB_BOTH constexpr int size_of(Element element) { return element == Element::int8 ? 1 : 2; }
SB_BOTH constexpr int size_of(Number number) { return number == Number::int8 ? 1 : number == Number::float32 ? 4 : 2; }
SB_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace sparsebert
