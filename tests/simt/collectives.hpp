// What the 32 lanes of a warp, or the 128 of four warps, do together. It is done once, for all of them, when the last
// has arrived; the maps from lanes to matrix elements are those of the PTX ISA, with g = lane / 4 and q = lane % 4.
#pragma once

#include <cstdint>
#include <cstring>

#include "memory.hpp"
#include "numbers.hpp"
#include "report.hpp"

namespace simt {

struct Lanes;
class Warpgroup;

// Lanes meet at the same one, which is told by its address.
struct Collective {
    const char* name;
    void (*run)(Lanes&);
    int lanes = 32;
};

struct Lanes {
    Now& now;
    Report& report;
    Shared& shared;
    Causality& causality;
    Warpgroup* warpgroup;  // null in a collective of 32
    int first_thread;
    const void* arguments[128];  // on the lanes' stacks

    template <typename Arguments>
    const Arguments& of(int lane) const {
        return *static_cast<const Arguments*>(arguments[lane]);
    }
    // What follows is done by this lane, and its mistakes are.
    void act_as(int lane) { now.thread = first_thread + lane; }
};

struct MatrixRow {
    uint32_t* fragment;
    const void* row;
};

// Four matrices of 8 x 8, row by row.
struct Matrices {
    uint16_t rows[32][8] = {};

    Matrices(Lanes& lanes, const char* operation) {
        for (int lane = 0; lane < 32; ++lane) {
            const void* row = lanes.of<MatrixRow>(lane).row;
            lanes.act_as(lane);
            if (lanes.shared.read(operation, row, 16, 16)) std::memcpy(rows[lane], row, 16);
        }
    }
    static uint32_t word(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }
};

inline void run_load_matrices(Lanes& lanes) {
    const Matrices matrices(lanes, "load_matrices");
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, q = lane % 4;
        for (int matrix = 0; matrix < 4; ++matrix) {
            const uint16_t(&row)[8] = matrices.rows[8 * matrix + g];
            lanes.of<MatrixRow>(lane).fragment[matrix] = Matrices::word(row[2 * q], row[2 * q + 1]);
        }
    }
}
inline constexpr Collective load_matrices{"load_matrices", run_load_matrices};

inline void run_load_matrices_transposed(Lanes& lanes) {
    const Matrices matrices(lanes, "load_matrices_transposed");
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, q = lane % 4;
        for (int matrix = 0; matrix < 4; ++matrix) {
            const uint16_t(*rows)[8] = matrices.rows + 8 * matrix + 2 * q;
            lanes.of<MatrixRow>(lane).fragment[matrix] = Matrices::word(rows[0][g], rows[1][g]);
        }
    }
}
inline constexpr Collective load_matrices_transposed{"load_matrices_transposed", run_load_matrices_transposed};

struct Row {
    const uint32_t* fragment;
    void* row;
};

inline void run_store_matrices_transposed(Lanes& lanes) {
    uint16_t rows[32][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, q = lane % 4;
        for (int matrix = 0; matrix < 4; ++matrix) {
            const uint32_t word = lanes.of<Row>(lane).fragment[matrix];
            rows[8 * matrix + 2 * q][g] = static_cast<uint16_t>(word);
            rows[8 * matrix + 2 * q + 1][g] = static_cast<uint16_t>(word >> 16);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        void* const row = lanes.of<Row>(lane).row;
        lanes.act_as(lane);
        if (lanes.shared.write("store_matrices_transposed", row, 16, 16)) std::memcpy(row, rows[lane], 16);
    }
}
inline constexpr Collective store_matrices_transposed{"store_matrices_transposed", run_store_matrices_transposed};

struct Shuffle {
    const void* from;
    void* to;
    int bits;
};

inline void run_shuffle_xor(Lanes& lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        const Shuffle& own = lanes.of<Shuffle>(lane);
        lanes.act_as(lane);
        if (own.bits < 0 || own.bits > 31) {
            lanes.report.add("out of range", "shuffle_xor by ", own.bits, ", expected 0 to 31");
        } else {
            std::memcpy(own.to, lanes.of<Shuffle>(lane ^ own.bits).from, 4);
        }
    }
}
inline constexpr Collective shuffle_xor{"shuffle_xor", run_shuffle_xor};

inline void run_sync_warp(Lanes& lanes) { lanes.causality.meet(lanes.now.first + lanes.first_thread, 32); }
inline constexpr Collective sync_warp{"sync_warp", run_sync_warp};

// There are as many registers as a thread asks for here.
inline void run_set_registers(Lanes&) {}
inline constexpr Collective set_registers{"setting registers", run_set_registers, 128};

struct Product {
    void* d;
    const uint32_t* a;
    const uint32_t* b;
    uint32_t metadata;
};

struct Float16 {
    static constexpr const char* dense = "multiply_dense<Half>";
    static constexpr const char* sparse[2] = {"multiply_sparse<Half, 0>", "multiply_sparse<Half, 1>"};
    static float decode(uint32_t bits) { return half_to_float(static_cast<uint16_t>(bits)); }
};
struct Brain16 {
    static constexpr const char* dense = "multiply_dense<BFloat16>";
    static constexpr const char* sparse[2] = {"multiply_sparse<BFloat16, 0>", "multiply_sparse<BFloat16, 1>"};
    static float decode(uint32_t bits) { return bfloat16_to_float(static_cast<uint16_t>(bits)); }
};

// To an element of D, in the end: rounded once, or as integers wrap around.
inline void add(float& d, double sum) { d = static_cast<float>(d + sum); }
inline void add(int32_t& d, float sum) {
    d = static_cast<int32_t>(static_cast<uint32_t>(d) + static_cast<uint32_t>(static_cast<int32_t>(sum)));
}

// D (16 x 8) += A B, where A[row][where[row][slot]] = a[row][slot]. Products of 16-bit floats are exact in double, and
// their sum is rounded to float once; hardware rounds more often, and not always to nearest. Of int8, the sums of 32
// products are exact in float already.
template <typename Element, typename Number, int SLOTS, int K>
void multiply(Lanes& lanes, const Number (&a)[16][SLOTS], const uint8_t (&where)[16][SLOTS], const Number (&b)[K][8]) {
    Number sums[16][8];
    for (int row = 0; row < 16; ++row) {
        Number sum[8] = {};
        for (int slot = 0; slot < SLOTS; ++slot) {
            const Number value = a[row][slot];
            const Number* const from = b[where[row][slot]];
            for (int column = 0; column < 8; ++column) sum[column] += value * from[column];
        }
        std::memcpy(sums[row], sum, sizeof(sum));
    }
    for (int lane = 0; lane < 32; ++lane) {
        auto* const d = static_cast<Element*>(lanes.of<Product>(lane).d);
        for (int i = 0; i < 4; ++i) add(d[i], sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
    }
}

// A of 16 x 16 elements of 16 bits, of a dense product or the kept ones of a sparse product.
template <typename Format>
void gather_a(const Lanes& lanes, double (&a)[16][16]) {
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, q = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const uint32_t word = lanes.of<Product>(lane).a[i];
            double* const to = &a[g + 8 * (i % 2)][8 * (i / 2) + 2 * q];
            to[0] = Format::decode(word & 0xffff);
            to[1] = Format::decode(word >> 16);
        }
    }
}

template <typename Format, int K>
void gather_b(const Lanes& lanes, double (&b)[K][8]) {
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, q = lane % 4;
        for (int j = 0; j < K / 8; ++j) {
            const uint32_t word = lanes.of<Product>(lane).b[j];
            b[8 * j + 2 * q][g] = Format::decode(word & 0xffff);
            b[8 * j + 2 * q + 1][g] = Format::decode(word >> 16);
        }
    }
}

// Where the two kept elements of a group of four lie, from the nibble that says so.
inline void place(Lanes& lanes, int lane, int row, int group, uint32_t nibble, uint8_t* where) {
    constexpr uint32_t LEGAL = 1u << 0b0100 | 1u << 0b1000 | 1u << 0b1100 | 1u << 0b1001 | 1u << 0b1101 | 1u << 0b1110;
    if (!(LEGAL >> nibble & 1)) {
        lanes.act_as(lane);
        lanes.report.add("metadata", "multiply_sparse with nibble ", nibble, " for row ", row, ", k from ", 4 * group,
                         ": its indices ", nibble & 3, " and ", nibble >> 2, " do not ascend");
    }
    where[0] = static_cast<uint8_t>(4 * group + (nibble & 3));
    where[1] = static_cast<uint8_t>(4 * group + (nibble >> 2));
}

template <typename Format, int SELECTOR>
void run_multiply_sparse(Lanes& lanes) {
    double a[16][16], b[32][8];
    uint8_t where[16][16];
    gather_a<Format>(lanes, a);
    gather_b<Format>(lanes, b);
    for (int row = 0; row < 16; ++row) {
        for (int group = 0; group < 8; ++group) {
            const int lane = 4 * (row % 8) + 2 * SELECTOR + group / 4;
            const uint32_t nibble = lanes.of<Product>(lane).metadata >> (16 * (row / 8) + 4 * (group % 4)) & 15;
            place(lanes, lane, row, group, nibble, &where[row][2 * group]);
        }
    }
    multiply<float>(lanes, a, where, b);
}
template <typename Format, int SELECTOR>
inline constexpr Collective multiply_sparse{Format::sparse[SELECTOR], run_multiply_sparse<Format, SELECTOR>};

inline void run_multiply_sparse_int8(Lanes& lanes) {
    float a[16][32], b[64][8];
    uint8_t where[16][32];
    const auto byte = [](uint32_t word, int i) { return static_cast<int8_t>(word >> 8 * i); };
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, q = lane % 4;
        const Product& product = lanes.of<Product>(lane);
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 4; ++j) {
                a[g + 8 * (i % 2)][16 * (i / 2) + 4 * q + j] = byte(product.a[i], j);
                b[16 * i + 4 * q + j][g] = byte(product.b[i], j);
            }
        }
    }
    for (int row = 0; row < 16; ++row) {
        for (int group = 0; group < 16; ++group) {
            const int lane = 4 * (row % 8) + row / 8 + 2 * (group / 8);
            const uint32_t nibble = lanes.of<Product>(lane).metadata >> 4 * (group % 8) & 15;
            place(lanes, lane, row, group, nibble, &where[row][2 * group]);
        }
    }
    multiply<int32_t>(lanes, a, where, b);
}
inline constexpr Collective multiply_sparse_int8{"multiply_sparse of int8", run_multiply_sparse_int8};

template <typename Format>
void run_multiply_dense(Lanes& lanes) {
    double a[16][16], b[16][8];
    uint8_t where[16][16];
    gather_a<Format>(lanes, a);
    gather_b<Format>(lanes, b);
    for (auto& row : where) {
        for (int k = 0; k < 16; ++k) row[k] = static_cast<uint8_t>(k);
    }
    multiply<float>(lanes, a, where, b);
}
template <typename Format>
inline constexpr Collective multiply_dense{Format::dense, run_multiply_dense<Format>};

}  // namespace simt
