// Everything that a kernel says to the hardware and not to C++: one function for each instruction or builtin.
//
// Kernels touch memory only through this header, so that the same kernel source also compiles with a host compiler
// against tests/simt/, which has its own version of this file: there threads are fibers, and every access is checked.
// Fragments are those of the PTX ISA, "Matrix Fragments for mma.sp.m16n8k32" and the neighbouring sections; for a lane,
// g = lane / 4 and q = lane % 4.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define SB_DEVICE __device__ __forceinline__
#define SB_KERNEL(threads) __global__ void __launch_bounds__(threads)
// Before a kernel's parameter: it stays in constant memory, where a reference to it may point.
#define SB_PARAMETERS __grid_constant__

namespace sparsebert {

// 16-bit floats as they lie in memory; arithmetic is done in float.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// What one lane moves in one go.
struct alignas(16) Words4 {
    uint32_t word[4];
};

SB_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
SB_DEVICE float to_float(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
SB_DEVICE float to_float(float x) { return x; }

// Rounds to nearest, ties to even, which is how torch rounds.
template <typename To>
SB_DEVICE To from_float(float x);
template <>
SB_DEVICE Half from_float<Half>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}
template <>
SB_DEVICE BFloat16 from_float<BFloat16>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
SB_DEVICE float from_float<float>(float x) {
    return x;
}

SB_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
SB_DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }

// The compiler fuses neither of these into an fma: int8 results are defined by two roundings.
SB_DEVICE float multiply_rn(float a, float b) { return __fmul_rn(a, b); }
SB_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
// IEEE division, whatever the compiler's flags.
SB_DEVICE float divide_rn(float a, float b) { return __fdiv_rn(a, b); }

// Where a thread is. Blocks are one-dimensional.
SB_DEVICE int thread_index() { return threadIdx.x; }
SB_DEVICE int block_x() { return blockIdx.x; }
SB_DEVICE int block_y() { return blockIdx.y; }

// The block's dynamic shared memory, 128-byte aligned; a kernel has no other.
SB_DEVICE uint8_t* shared_memory() {
    extern __shared__ __align__(128) uint8_t memory[];
    return memory;
}

// Shared memory's own addresses, which the instructions below take.
SB_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Every thread of the block has arrived, and sees what the others wrote to shared and global memory before.
SB_DEVICE void sync_block() { __syncthreads(); }

// Plain accesses to shared memory, and to global memory that no other block writes meanwhile.
template <typename T>
SB_DEVICE T load_shared(const T* from) {
    return *from;
}
template <typename T>
SB_DEVICE void store_shared(T* to, T value) {
    *to = value;
}
template <typename T>
SB_DEVICE T load_global(const T* from) {
    return __ldg(from);
}
template <>
SB_DEVICE Half load_global<Half>(const Half* from) {
    return {__ldg(&from->bits)};
}
template <>
SB_DEVICE BFloat16 load_global<BFloat16>(const BFloat16* from) {
    return {__ldg(&from->bits)};
}
template <>
SB_DEVICE Words4 load_global<Words4>(const Words4* from) {
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(from));
    return {{x.x, x.y, x.z, x.w}};
}
template <typename T>
SB_DEVICE void store_global(T* to, T value) {
    *to = value;
}
template <>
SB_DEVICE void store_global<Words4>(Words4* to, Words4 value) {
    *reinterpret_cast<uint4*>(to) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}

// All COUNT elements in one instruction, of 8 or 16 bytes, to an address that they divide.
template <typename T, int COUNT>
SB_DEVICE void store_vector(T* to, const T (&vector)[COUNT]) {
    static_assert(sizeof(vector) == 8 || sizeof(vector) == 16, "one store");
    if constexpr (sizeof(vector) == 16) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(vector);
    } else {
        *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(vector);
    }
}

// 16 bytes of a weight, which a block reads once: past the L1, which is left to the activations.
SB_DEVICE Words4 load_weight(const Words4* from) {
    Words4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "l"(from));
    return x;
}

// What another block wrote: from the L2, since the L1s do not follow each other.
SB_DEVICE Words4 load_from_l2(const Words4* from) {
    Words4 x;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "l"(from)
                 : "memory");
    return x;
}

// What this thread wrote before is seen by the whole device before anything it does after.
SB_DEVICE void fence_device() { __threadfence(); }

// Adds in global memory and returns what was there.
SB_DEVICE uint32_t atomic_add(uint32_t* to, uint32_t value) { return atomicAdd(to, value); }

// Starts a copy of BYTES (4, 8 or 16) to shared memory, of which the last BYTES - valid are zeros and are not read.
template <int BYTES>
SB_DEVICE void copy_async(void* shared, const void* global, int valid) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async takes");
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"(shared_address(shared)), "l"(global), "r"(valid)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(shared_address(shared)), "l"(global), "n"(BYTES), "r"(valid)
                     : "memory");
    }
}

// Closes this thread's group of copies.
SB_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All groups of this thread but the latest PENDING have arrived; other threads see them after sync_block().
template <int PENDING>
SB_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane i names row i % 8 of matrix i / 8 (16 bytes, aligned), and gets of each
// matrix row g, elements 2q and 2q + 1.
SB_DEVICE void load_matrices(uint32_t (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed: of each, elements g of rows 2q and 2q + 1.
SB_DEVICE void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// What the lane has whose number differs in these bits; all lanes of the warp are there.
template <typename T>
SB_DEVICE T shuffle_xor(T value, int bits) {
    return __shfl_xor_sync(0xffffffff, value, bits);
}

// The products. D (16 x 8) += A B, A being 2:4 along k, its kept values in the fragment of a dense A of half the
// columns. Lane's d: rows g, g, g + 8, g + 8, columns 2q, 2q + 1, 2q, 2q + 1.

// k = 32. b[j]: B's rows 8j + 2q and 8j + 2q + 1, column g. Metadata comes from the lanes with q = 2 SELECTOR (k 0 to 15)
// and 2 SELECTOR + 1 (k 16 to 31): 4 bits for each group of 4, row g in the low half of the word, row g + 8 in the high.
template <typename T, int SELECTOR>
SB_DEVICE void multiply_sparse(float (&d)[4], const Words4& a, const uint32_t (&b)[4], uint32_t metadata) {
    static_assert(SELECTOR == 0 || SELECTOR == 1, "what this shape takes");
    if constexpr (std::is_same_v<T, Half>) {
        asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),
                       "r"(b[3]), "r"(metadata), "n"(SELECTOR));
    } else {
        asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),
                       "r"(b[3]), "r"(metadata), "n"(SELECTOR));
    }
}

// k = 64, int8. b[j]: B's rows 16j + 4q to 16j + 4q + 3, column g. Every lane gives metadata: of row g + 8 (q % 2) and
// k from 32 (q / 2), eight groups.
SB_DEVICE void multiply_sparse(int32_t (&d)[4], const Words4& a, const uint32_t (&b)[4], uint32_t metadata) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),
                   "r"(b[3]), "r"(metadata));
}

// Dense, k = 16. a: rows g, g + 8, g, g + 8, columns 2q and 2q + 1, the last two words 8 further; b[j]: B's rows
// 8j + 2q and 8j + 2q + 1, column g.
template <typename T>
SB_DEVICE void multiply_dense(float (&d)[4], const Words4& a, uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, Half>) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
    }
}

}  // namespace sparsebert
