// Numbers of the types in elements.h, on the device.
#pragma once

#include <common/elements.h>
#include <common/intrinsics.cuh>

namespace sparsebert {

// What differs between the types of x.
template <Element ELEMENT>
struct Types;
template <>
struct Types<Element::half> {
    using X = Half;
    using Sum = float;
};
template <>
struct Types<Element::bfloat16> {
    using X = BFloat16;
    using Sum = float;
};
template <>
struct Types<Element::int8> {
    using X = int8_t;
    using Sum = int32_t;
};

SB_DEVICE float load_number(const void* from, Number number, int64_t index) {
    switch (number) {
        case Number::half:
            return to_float(load_global(static_cast<const Half*>(from) + index));
        case Number::bfloat16:
            return to_float(load_global(static_cast<const BFloat16*>(from) + index));
        default:
            return load_global(static_cast<const float*>(from) + index);
    }
}

}  // namespace sparsebert
