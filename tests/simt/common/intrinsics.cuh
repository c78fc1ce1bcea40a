// csrc/common/intrinsics.cuh for the CPU: the same names, carried out and checked by simt::Machine, one launch at a
// time. What each function does is said there.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../simt.hpp"

#define SB_DEVICE inline
#define SB_KERNEL(threads) inline void
#define SB_PARAMETERS

namespace sparsebert {

// CUDA has them everywhere.
using std::max;
using std::min;

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

struct alignas(16) Words4 {
    uint32_t word[4];
};

inline float to_float(Half x) { return simt::half_to_float(x.bits); }
inline float to_float(BFloat16 x) { return simt::bfloat16_to_float(x.bits); }
inline float to_float(float x) { return x; }

inline float float_of_bits(uint32_t bits) { return simt::float_of_bits(bits); }
inline uint32_t bits_of_float(float x) { return simt::bits_of_float(x); }

template <typename To>
To from_float(float x);
template <>
inline Half from_float<Half>(float x) {
    return {simt::float_to_half(x)};
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
    return {simt::float_to_bfloat16(x)};
}
template <>
inline float from_float<float>(float x) {
    return x;
}

// Compiled with -ffp-contract=off.
inline float multiply_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float divide_rn(float a, float b) { return a / b; }

inline int thread_index() { return simt::Machine::running->now.thread; }
inline int block_x() { return simt::Machine::running->now.block_x; }
inline int block_y() { return simt::Machine::running->now.block_y; }

inline uint8_t* shared_memory() { return simt::Machine::running->shared().data(); }
inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - shared_memory());
}

inline void sync_block() { simt::Machine::running->meet(simt::barrier); }

template <typename T>
T load_shared(const T* from) {
    T value{};
    if (simt::Machine::running->shared().read("load_shared", from, sizeof(T), sizeof(T))) {
        std::memcpy(&value, from, sizeof(T));
    }
    return value;
}
template <typename T>
void store_shared(T* to, T value) {
    if (simt::Machine::running->shared().write("store_shared", to, sizeof(T), sizeof(T))) {
        std::memcpy(to, &value, sizeof(T));
    }
}

// Names that a kernel cannot clash with.
namespace host {

template <typename T>
T load(const char* operation, const T* from, simt::Global::Path path) {
    T value{};
    if (simt::Machine::running->global.read(operation, from, sizeof(T), sizeof(T), path)) {
        std::memcpy(&value, from, sizeof(T));
    }
    return value;
}

template <typename T>
using Format = std::conditional_t<std::is_same_v<T, Half>, simt::Float16, simt::Brain16>;

}  // namespace host

template <typename T>
T load_global(const T* from) {
    return host::load("load_global", from, simt::Global::Cached);
}
template <typename T>
void store_global(T* to, T value) {
    if (simt::Machine::running->global.write("store_global", to, sizeof(T), sizeof(T))) {
        std::memcpy(to, &value, sizeof(T));
    }
}
template <typename T, int COUNT>
void store_vector(T* to, const T (&vector)[COUNT]) {
    static_assert(sizeof(vector) == 8 || sizeof(vector) == 16, "one store");
    if (simt::Machine::running->global.write("store_vector", to, sizeof(vector), sizeof(vector))) {
        std::memcpy(to, vector, sizeof(vector));
    }
}
inline Words4 load_weight(const Words4* from) { return host::load("load_weight", from, simt::Global::Cached); }
inline Words4 load_from_l2(const Words4* from) { return host::load("load_from_l2", from, simt::Global::Coherent); }

inline void fence_device() { simt::Machine::running->fence(); }

inline uint32_t atomic_add(uint32_t* to, uint32_t value) {
    simt::Machine::running->publish();
    uint32_t before = 0;
    if (simt::Machine::running->global.update("atomic_add", to, sizeof(before))) {
        before = *to;
        *to = before + value;
    }
    return before;
}

template <int BYTES>
void copy_async(void* shared, const void* global, int valid) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async takes");
    simt::Machine::running->copy(shared, global, BYTES, valid);
}
inline void commit_copies() { simt::Machine::running->commit(); }
template <int PENDING>
void wait_copies() {
    simt::Machine::running->wait(PENDING);
}

inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
    const simt::MatrixRow arguments{fragment, row};
    simt::Machine::running->meet(simt::load_matrices, &arguments);
}
inline void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
    const simt::MatrixRow arguments{fragment, row};
    simt::Machine::running->meet(simt::load_matrices_transposed, &arguments);
}

template <typename T>
T shuffle_xor(T value, int bits) {
    static_assert(sizeof(T) == 4, "one register");
    T other{};
    const simt::Shuffle arguments{&value, &other, bits};
    simt::Machine::running->meet(simt::shuffle_xor, &arguments);
    return other;
}

template <typename T, int SELECTOR>
void multiply_sparse(float (&d)[4], const Words4& a, const uint32_t (&b)[4], uint32_t metadata) {
    static_assert(SELECTOR == 0 || SELECTOR == 1, "what this shape takes");
    const simt::Product arguments{d, a.word, b, metadata};
    simt::Machine::running->meet(simt::multiply_sparse<host::Format<T>, SELECTOR>, &arguments);
}

inline void multiply_sparse(int32_t (&d)[4], const Words4& a, const uint32_t (&b)[4], uint32_t metadata) {
    const simt::Product arguments{d, a.word, b, metadata};
    simt::Machine::running->meet(simt::multiply_sparse_int8, &arguments);
}

template <typename T>
void multiply_dense(float (&d)[4], const Words4& a, uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    const simt::Product arguments{d, a.word, b, 0};
    simt::Machine::running->meet(simt::multiply_dense<host::Format<T>>, &arguments);
}

}  // namespace sparsebert
