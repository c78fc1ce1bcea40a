// 16-bit floats by their bits. To float is exact; from float rounds to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace simt {

inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float half_to_float(uint16_t half) {
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    const uint32_t sign = (half & 0x8000u) << 16;
    // In place but for the exponent's bias, which a multiplication moves, for subnormals too.
    const bool finite = (half & 0x7c00u) != 0x7c00u;
    const uint32_t bits = finite ? bits_of_float(float_of_bits(magnitude) * 0x1p112f) : magnitude | 0x7f800000u;
    return float_of_bits(bits | sign);
}

inline uint16_t float_to_half(float x) {
    const uint32_t sign = bits_of_float(x) >> 16 & 0x8000u;
    const uint32_t magnitude = bits_of_float(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;  // as the hardware: one NaN for all
    if (magnitude >= bits_of_float(65520.0f)) return sign | 0x7c00u;
    if (magnitude < bits_of_float(0x1p-14f)) {
        // Beside a half, a float's last bit is that of a subnormal: the addition rounds.
        return sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f));
    }
    return sign | ((magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

inline float bfloat16_to_float(uint16_t x) { return float_of_bits(uint32_t{x} << 16); }

inline uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = bits_of_float(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

}  // namespace simt
