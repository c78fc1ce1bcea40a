// Products of a warpgroup: four warps whose first is a multiple of four (wgmma, sm_90a).
//
// D (64 x N) += A B, or = A B where `add` is false. Lane's d, element 4j + i: of its warp's 16 rows, rows g, g, g + 8,
// g + 8, columns 8j + 2q, 8j + 2q + 1 and the same two again. A comes from shared memory (a descriptor) or registers, B
// from shared memory; both lie along k, with 32 bytes of A's kept values in one product. All four warps say the same.
//
// Products run on their own. From start_products() to wait_products() the sums and A's registers are the hardware's,
// and so are the operands in shared memory, which it reads through the async proxy.
#pragma once

#include <common/intrinsics.cuh>
#include <common/tile_descriptor.cuh>

namespace sparsebert {

template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

// Products that follow see what this thread did to their registers.
SB_DEVICE void start_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of products.
SB_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// The compiler moves no use of the sums to before this.
template <int COUNT>
SB_DEVICE void hold(float (&d)[COUNT]) {
#pragma unroll
    for (float& sum : d) asm volatile("" : "+f"(sum)::"memory");
}
template <int COUNT>
SB_DEVICE void hold(int32_t (&d)[COUNT]) {
#pragma unroll
    for (int32_t& sum : d) asm volatile("" : "+r"(sum)::"memory");
}

// All groups but the latest PENDING have ended; the sums that are named may be used.
template <int PENDING, typename... Sums>
SB_DEVICE void wait_products(Sums&... sums) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    (hold(sums), ...);
}

// An asm statement cannot loop over its operands: here are those of a lane's N / 2 sums, by N, and where the others
// stand after them.

#define SB_LIST_8 "%0, %1, %2, %3"
#define SB_LIST_16 SB_LIST_8 ", " "%4, %5, %6, %7"
#define SB_LIST_32 SB_LIST_16 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define SB_LIST_64 SB_LIST_32 ", " "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SB_LIST_128 SB_LIST_64 ", "                                                                   \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
    "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SB_LIST_256 SB_LIST_128 ", "                                                                    \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "   \
    "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, " \
    "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, "  \
    "%118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SB_SUMS_8(how, i) how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3])
#define SB_SUMS_16(how, i) SB_SUMS_8(how, i), SB_SUMS_8(how, i + 4)
#define SB_SUMS_32(how, i) SB_SUMS_16(how, i), SB_SUMS_16(how, i + 8)
#define SB_SUMS_64(how, i) SB_SUMS_32(how, i), SB_SUMS_32(how, i + 16)
#define SB_SUMS_128(how, i) SB_SUMS_64(how, i), SB_SUMS_64(how, i + 32)
#define SB_SUMS_256(how, i) SB_SUMS_128(how, i), SB_SUMS_128(how, i + 64)

#define SB_FOR_EACH_N(product)                                                        \
    if constexpr (N == 8) {                                                           \
        product(8, "%4", "%5", "%6", "%7", "%8", "%9", "%10", "%11");                 \
    } else if constexpr (N == 16) {                                                   \
        product(16, "%8", "%9", "%10", "%11", "%12", "%13", "%14", "%15");            \
    } else if constexpr (N == 32) {                                                   \
        product(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22", "%23");          \
    } else if constexpr (N == 64) {                                                   \
        product(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%39");          \
    } else if constexpr (N == 128) {                                                  \
        product(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%71");         \
    } else {                                                                          \
        static_assert(N == 256, "N is 8, 16, 32, 64, 128 or 256");                    \
        product(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134", "%135"); \
    }
// tail: what the instruction takes after the predicate that adds.
#define SB_PRODUCT(n, how, instruction, operands, last, tail, ...)                                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " last ", 0;\n"                              \
                 "wgmma.mma_async." instruction " {" SB_LIST_##n "}, " operands ", add" tail ";\n}" \
                 : SB_SUMS_##n(how, 0)                                                              \
                 : __VA_ARGS__, "r"(static_cast<int>(add)))
#define SB_BY_TYPE(n, sparse, k16, k8, operands, last, tail, ...)                                                   \
    if constexpr (std::is_same_v<T, Half>) {                                                                        \
        SB_PRODUCT(n, "+f", sparse "sync.aligned.m64n" #n k16 ".f32.f16.f16", operands, last, tail, __VA_ARGS__);   \
    } else if constexpr (std::is_same_v<T, BFloat16>) {                                                             \
        SB_PRODUCT(n, "+f", sparse "sync.aligned.m64n" #n k16 ".f32.bf16.bf16", operands, last, tail, __VA_ARGS__); \
    } else {                                                                                                        \
        SB_PRODUCT(n, "+r", sparse "sync.aligned.m64n" #n k8 ".s32.s8.s8", operands, last, "", __VA_ARGS__);        \
    }
// For floats: neither operand is negated, and none that is in shared memory is transposed.
#define SB_PLAIN_BOTH ", 1, 1, 0, 0"
#define SB_PLAIN_ONE ", 1, 1, 0"

// Dense: k of 16, of int8 32.
template <typename T, int N>
SB_DEVICE void multiply_tile(SumOf<T> (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
#define SB_RUN(n, p0, p1, p2, ...) \
    SB_BY_TYPE(n, "", "k16", "k32", p0 ", " p1, p2, SB_PLAIN_BOTH, "l"(a), "l"(b))
    SB_FOR_EACH_N(SB_RUN)
#undef SB_RUN
}
// a: the fragment of multiply_dense; of int8, of the same bytes.
template <typename T, int N>
SB_DEVICE void multiply_tile(SumOf<T> (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
#define SB_RUN(n, p0, p1, p2, p3, p4, p5, ...)                                                                 \
    SB_BY_TYPE(n, "", "k16", "k32", "{" p0 ", " p1 ", " p2 ", " p3 "}, " p4, p5, SB_PLAIN_ONE, "r"(a[0]), "r"(a[1]), \
               "r"(a[2]), "r"(a[3]), "l"(b))
    SB_FOR_EACH_N(SB_RUN)
#undef SB_RUN
}

// A is 2:4 along k, of 32 and of int8 64, its kept values as a dense A of half as many; metadata in each warp as in
// multiply_sparse of its 16 rows. SELECTOR is 0 for int8.
template <typename T, int N, int SELECTOR>
SB_DEVICE void multiply_sparse_tile(SumOf<T> (&d)[N / 2], uint64_t a, uint64_t b, uint32_t metadata, bool add) {
    static_assert(SELECTOR == 0 || (SELECTOR == 1 && !std::is_same_v<T, int8_t>), "what these shapes take");
#define SB_RUN(n, p0, p1, p2, p3, p4, ...)                                                                     \
    SB_BY_TYPE(n, "sp.", "k32", "k64", p0 ", " p1 ", " p2 ", " p3, p4, SB_PLAIN_BOTH, "l"(a), "l"(b), "r"(metadata), \
               "n"(SELECTOR))
    SB_FOR_EACH_N(SB_RUN)
#undef SB_RUN
}
template <typename T, int N, int SELECTOR>
SB_DEVICE void multiply_sparse_tile(SumOf<T> (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, uint32_t metadata,
                                    bool add) {
    static_assert(SELECTOR == 0 || (SELECTOR == 1 && !std::is_same_v<T, int8_t>), "what these shapes take");
#define SB_RUN(n, p0, p1, p2, p3, p4, p5, p6, p7)                                                           \
    SB_BY_TYPE(n, "sp.", "k32", "k64", "{" p0 ", " p1 ", " p2 ", " p3 "}, " p4 ", " p5 ", " p6, p7, SB_PLAIN_ONE, \
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(SELECTOR))
    SB_FOR_EACH_N(SB_RUN)
#undef SB_RUN
}

#undef SB_PLAIN_ONE
#undef SB_PLAIN_BOTH
#undef SB_BY_TYPE
#undef SB_PRODUCT
#undef SB_FOR_EACH_N

#undef SB_SUMS_8
#undef SB_LIST_8
#undef SB_SUMS_16
#undef SB_LIST_16
#undef SB_SUMS_32
#undef SB_LIST_32
#undef SB_SUMS_64
#undef SB_LIST_64
#undef SB_SUMS_128
#undef SB_LIST_128
#undef SB_SUMS_256
#undef SB_LIST_256

}  // namespace sparsebert
