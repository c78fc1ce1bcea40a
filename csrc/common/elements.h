// Types of numbers, and what host and device code both do with sizes: plain C++.
#pragma once

#include <cstdint>
#include <type_traits>

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

// run(element), with the element as a constant: decltype(element)::value.
template <typename Run>
void with_element(Element element, Run run) {
    switch (element) {
        case Element::half:
            return run(std::integral_constant<Element, Element::half>{});
        case Element::bfloat16:
            return run(std::integral_constant<Element, Element::bfloat16>{});
        case Element::int8:
            return run(std::integral_constant<Element, Element::int8>{});
    }
}

SB_BOTH constexpr int size_of(Element element) { return element == Element::int8 ? 1 : 2; }
SB_BOTH constexpr int size_of(Number number) { return number == Number::int8 ? 1 : number == Number::float32 ? 4 : 2; }
SB_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace sparsebert
