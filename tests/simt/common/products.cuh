// csrc/common/products.cuh for the CPU, as intrinsics.cuh beside this file is that of its namesake.
#pragma once

#include <common/intrinsics.cuh>
#include <common/tile_descriptor.cuh>

namespace sparsebert {

template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

namespace host {

template <typename T, bool SPARSE, int N, int SELECTOR, bool A_IN_REGISTERS>
void start_product(void* d, const uint32_t* a_registers, uint64_t a, uint64_t b, uint32_t metadata, bool add) {
    static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 128 || N == 256, "N is 8, 16, 32, 64, 128 or 256");
    static_assert(SELECTOR == 0 || (SELECTOR == 1 && !std::is_same_v<T, int8_t>), "what these shapes take");
    constexpr auto element = std::is_same_v<T, int8_t> ? simt::ProductShape::int8
                             : std::is_same_v<T, Half> ? simt::ProductShape::float16
                                                       : simt::ProductShape::brain16;
    using Instruction = simt::TileInstruction<element, SPARSE, N, SELECTOR, A_IN_REGISTERS>;
    const simt::TileProduct arguments{&Instruction::shape, d, a_registers, a, b, metadata, add};
    simt::Machine::running->meet_warpgroup(Instruction::collective, &arguments);
}

}  // namespace host

inline void start_products() { simt::Machine::running->meet_warpgroup(simt::start_products); }
inline void commit_products() { simt::Machine::running->meet_warpgroup(simt::commit_products); }

template <typename Sum, int COUNT>
void hold(Sum (&)[COUNT]) {}

template <int PENDING, typename... Sums>
void wait_products(Sums&...) {
    const int pending = PENDING;
    simt::Machine::running->meet_warpgroup(simt::wait_products<PENDING>, &pending);
}

template <typename T, int N>
void multiply_tile(SumOf<T> (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    host::start_product<T, false, N, 0, false>(d, nullptr, a, b, 0, add);
}
template <typename T, int N>
void multiply_tile(SumOf<T> (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    host::start_product<T, false, N, 0, true>(d, a, 0, b, 0, add);
}
template <typename T, int N, int SELECTOR>
void multiply_sparse_tile(SumOf<T> (&d)[N / 2], uint64_t a, uint64_t b, uint32_t metadata, bool add) {
    host::start_product<T, true, N, SELECTOR, false>(d, nullptr, a, b, metadata, add);
}
template <typename T, int N, int SELECTOR>
void multiply_sparse_tile(SumOf<T> (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, uint32_t metadata, bool add) {
    host::start_product<T, true, N, SELECTOR, true>(d, a, 0, b, metadata, add);
}

}  // namespace sparsebert
