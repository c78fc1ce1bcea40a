// The ceilings of a GPU, one instruction at a time: loops that hold nothing else. peaks.py builds and calls this; the
// C functions at the end are all that it sees.
//
// PEAKS_CAPABILITY is the compute capability compiled for, as in 90. PEAKS_WGMMA says that the target is sm_90a.
#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/intrinsics.cuh"

using namespace sparsebert;

// What every loop is given. Nothing sets `keep`, and the compiler cannot know: what is stored under it is computed.
struct Loop {
    int iterations;
    int keep;
    int rows;                    // of a loop on memory: words that a thread reads in one iteration
    const Words4* from;
    Words4* to;
    unsigned long long* clocks;  // of each block, first thread: from the loop's begin to its end
};

// Operands. Random, because a product of zeros takes less power and so runs at a higher clock.

SB_DEVICE uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// Nearly normal, of variance 1: four uniform bytes.
SB_DEVICE float random_float(uint32_t seed) {
    const uint32_t x = mix(seed);
    return (int((x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24)) - 510) / 148.f;
}

// As many elements of T as a word holds.
template <typename T>
SB_DEVICE uint32_t random_word(uint32_t seed) {
    if constexpr (std::is_same_v<T, int8_t>) {
        return mix(seed);
    } else {
        const uint32_t low = from_float<T>(random_float(2 * seed)).bits;
        const uint32_t high = from_float<T>(random_float(2 * seed + 1)).bits;
        return low | high << 16;
    }
}

// Eight groups: each nibble is one of the six ordered pairs of positions; others are undefined.
SB_DEVICE uint32_t random_metadata(uint32_t seed) {
    uint32_t word = 0;
    for (int group = 0; group < 8; ++group) word = word << 4 | (0xed9c84u >> 4 * (mix(8 * seed + group) % 6) & 15);
    return word;
}

// The clock is that of the block's multiprocessor, so a loop ends when the last warp has ended it.
SB_DEVICE unsigned long long start_clock() {
    sync_block();
    return clock64();
}
SB_DEVICE void stop_clock(const Loop& loop, unsigned long long start) {
    sync_block();
    if (thread_index() == 0) loop.clocks[block_x()] = clock64() - start;
}

// Products of a warp: every pair of TALL fragments of A and WIDE of B, each pair with sums of its own, as a kernel's
// tile has them. Successive products share at most one operand.
constexpr int TALL = 4, WIDE = 2, ROUNDS = 4;

SB_DEVICE void multiply_dense(int32_t (&d)[4], const Words4& a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}

template <typename T, bool SPARSE>
SB_DEVICE void warp_loop(const Loop& loop) {
    using Sum = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;
    const uint32_t seed = (block_x() * blockDim.x + thread_index()) * 64;
    Words4 a[TALL];
    uint32_t metadata[TALL], b[WIDE][4];
    for (int i = 0; i < TALL; ++i) {
        for (int j = 0; j < 4; ++j) a[i].word[j] = random_word<T>(seed + 4 * i + j);
        metadata[i] = random_metadata(seed + i);
    }
    for (int i = 0; i < WIDE; ++i)
        for (int j = 0; j < 4; ++j) b[i][j] = random_word<T>(seed + 4 * (TALL + i) + j);
    Sum d[TALL][WIDE][4] = {};

    const unsigned long long start = start_clock();
#pragma unroll 1
    for (int iteration = 0; iteration < loop.iterations; ++iteration) {
#pragma unroll
        for (int product = 0; product < ROUNDS * TALL * WIDE; ++product) {
            const int i = product % TALL, j = product / TALL % WIDE;
            if constexpr (std::is_same_v<T, int8_t>) {
                if constexpr (SPARSE)
                    multiply_sparse(d[i][j], a[i], b[j], metadata[i]);
                else
                    multiply_dense(d[i][j], a[i], b[j][0], b[j][1]);
            } else {
                if constexpr (SPARSE)
                    multiply_sparse<T, 0>(d[i][j], a[i], b[j], metadata[i]);
                else
                    multiply_dense<T>(d[i][j], a[i], b[j][0], b[j][1]);
            }
        }
    }
    stop_clock(loop, start);
    if (loop.keep) {
        for (int i = 0; i < TALL; ++i)
            for (int j = 0; j < WIDE; ++j)
                for (int k = 0; k < 4; ++k) loop.to[thread_index()].word[k] += uint32_t(d[i][j][k]);
    }
}

#define WARP_LOOP(NAME, TYPE, SPARSE)                                   \
    extern "C" __global__ void __launch_bounds__(256) NAME(Loop loop) { \
        warp_loop<TYPE, SPARSE>(loop);                                  \
    }
WARP_LOOP(mma_fp16, Half, false)
WARP_LOOP(mma_bf16, BFloat16, false)
WARP_LOOP(mma_s8, int8_t, false)
WARP_LOOP(mma_sp_fp16, Half, true)
WARP_LOOP(mma_sp_bf16, BFloat16, true)
WARP_LOOP(mma_sp_s8, int8_t, true)

// Products of a warpgroup. Operands lie in panels of rows of 128 bytes, K-major, in the 128-byte swizzle: 64 rows of A
// for each warpgroup, N rows of B for all of them. A step takes 32 bytes of each row of A and of B; sparse, 64 of B,
// which then has two panels.
constexpr int STEPS = 4, ROW_BYTES = 128, A_BYTES = 64 * ROW_BYTES;
constexpr int CHAIN = 4 * STEPS;  // products between two waits
template <int N, bool SPARSE>
constexpr int B_BYTES = N * ROW_BYTES * (SPARSE ? 2 : 1);

#ifdef PEAKS_WGMMA
SB_DEVICE uint64_t descriptor(const uint8_t* tile) {
    // Start, distance of 8 rows from the next 8 (this layout does not read the leading offset), 128-byte swizzle.
    return uint64_t(shared_address(tile) >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(8 * ROW_BYTES >> 4) << 32 |
           uint64_t(1) << 62;
}
SB_DEVICE void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SB_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
SB_DEVICE void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

template <typename PRODUCT>
SB_DEVICE void warpgroup_loop(const Loop& loop) {
    using Sum = typename PRODUCT::Sum;
    constexpr int N = PRODUCT::N;
    constexpr int B_STEP = PRODUCT::SPARSE ? 64 : 32;  // bytes of a row of B
    constexpr int STEPS_A_PANEL = ROW_BYTES / B_STEP;
    constexpr int B_ALL = B_BYTES<N, PRODUCT::SPARSE>;
    uint8_t* b = shared_memory() + (-shared_address(shared_memory()) & 1023);  // where the swizzle's pattern begins
    // Taken from a lane, so that the compiler knows the same for the whole warp, as descriptors have to be.
    const int warpgroup = __shfl_sync(~0u, thread_index() / 128, 0);
    uint8_t* a = b + B_ALL + A_BYTES * warpgroup;
    const uint32_t seed = (block_x() * blockDim.x + thread_index()) * 4096;
    const int bytes = B_ALL + (PRODUCT::REGISTERS ? 0 : A_BYTES * blockDim.x / 128);
    for (int i = thread_index(); i < bytes / 4; i += blockDim.x)
        reinterpret_cast<uint32_t*>(b)[i] = random_word<typename PRODUCT::Type>(seed + i);
    uint32_t fragment[STEPS][4], metadata[STEPS];
    for (int i = 0; i < STEPS; ++i) {
        for (int j = 0; j < 4; ++j) fragment[i][j] = random_word<typename PRODUCT::Type>(seed + 4 * i + j + 2048);
        metadata[i] = random_metadata(seed + i);
    }
    Sum d[N / 2] = {};
    // The products read shared memory past the path that ordinary stores take.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");

    const unsigned long long start = start_clock();
    const uint64_t a_tile = descriptor(a), b_tile = descriptor(b);
#pragma unroll 1
    for (int iteration = 0; iteration < loop.iterations; ++iteration) {
        fence_products();
#pragma unroll
        for (int product = 0; product < CHAIN; ++product) {
            const int step = product % STEPS, panel = step / STEPS_A_PANEL;
            const int offset = panel * N * ROW_BYTES + step % STEPS_A_PANEL * B_STEP;
            PRODUCT::multiply(d, a_tile + (step * 32 >> 4), fragment[step], b_tile + (offset >> 4), metadata[step]);
        }
        commit_products();
        wait_products<1>();
    }
    wait_products<0>();
    stop_clock(loop, start);
    if (loop.keep) {
        for (int i = 0; i < N / 2; ++i) loop.to[thread_index()].word[i % 4] += uint32_t(d[i]);
    }
}

// One product as an instruction. The sums are operands 0 to N / 2 - 1; A's descriptor, A's registers, B's descriptor
// and the metadata follow.
#define SUMS_64                                                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                   \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_128                                                                                               \
    SUMS_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "               \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_256                                                                                               \
    SUMS_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "              \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                         \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "             \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TIED_8(C, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3]), C(d[i + 4]), C(d[i + 5]), C(d[i + 6]), C(d[i + 7])
#define TIED_64(C, i) TIED_8(C, i), TIED_8(C, i + 8), TIED_8(C, i + 16), TIED_8(C, i + 24)
#define TIED_128(C, i) TIED_64(C, i), TIED_64(C, i + 32)
#define TIED_256(C, i) TIED_128(C, i), TIED_128(C, i + 64)
#define SS_64 "%32, %37"
#define SS_128 "%64, %69"
#define SS_256 "%128, %133"
#define RS_64 "{%33, %34, %35, %36}, %37"
#define RS_128 "{%65, %66, %67, %68}, %69"
#define RS_256 "{%129, %130, %131, %132}, %133"
#define DENSE_64 ""
#define DENSE_128 ""
#define DENSE_256 ""
#define SP_64 ", %38, 0"
#define SP_128 ", %70, 0"
#define SP_256 ", %134, 0"

// NAME is the loop's; SHAPE the instruction's name behind "wgmma.mma_async"; TAIL what its type wants last.
#define WGMMA(NAME, TYPE, SUM, C, KIND, FORM, N_, SHAPE, TAIL)                                                       \
    struct NAME##_product {                                                                                          \
        using Type = TYPE;                                                                                           \
        using Sum = SUM;                                                                                             \
        static constexpr int N = N_;                                                                                 \
        static constexpr bool SPARSE = sizeof(KIND##_##N_) > 1, REGISTERS = FORM##_##N_[0] == '{';                   \
        SB_DEVICE static void multiply(Sum (&d)[N / 2], uint64_t a, const uint32_t (&f)[4], uint64_t b, uint32_t e) { \
            asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async" SHAPE " {" SUMS_##N_ "}, " FORM##_##N_ \
                         KIND##_##N_ ", p" TAIL ";}"                                                                 \
                         : TIED_##N_(C, 0)                                                                           \
                         : "l"(a), "r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3]), "l"(b), "r"(e));                      \
        }                                                                                                            \
    };                                                                                                               \
    extern "C" __global__ void __launch_bounds__(N_ == 64 ? 512 : 256) NAME(Loop loop) {                             \
        warpgroup_loop<NAME##_product>(loop);                                                                        \
    }
#define WGMMAS(N)                                                                                                     \
    WGMMA(wgmma_ss_bf16_n##N, BFloat16, float, "+f", DENSE, SS, N, ".sync.aligned.m64n" #N "k16.f32.bf16.bf16",       \
          ", 1, 1, 0, 0")                                                                                             \
    WGMMA(wgmma_rs_bf16_n##N, BFloat16, float, "+f", DENSE, RS, N, ".sync.aligned.m64n" #N "k16.f32.bf16.bf16",       \
          ", 1, 1, 0")                                                                                                \
    WGMMA(wgmma_ss_s8_n##N, int8_t, int32_t, "+r", DENSE, SS, N, ".sync.aligned.m64n" #N "k32.s32.s8.s8", "")         \
    WGMMA(wgmma_rs_s8_n##N, int8_t, int32_t, "+r", DENSE, RS, N, ".sync.aligned.m64n" #N "k32.s32.s8.s8", "")         \
    WGMMA(wgmma_sp_ss_bf16_n##N, BFloat16, float, "+f", SP, SS, N, ".sp.sync.aligned.m64n" #N "k32.f32.bf16.bf16",    \
          ", 1, 1, 0, 0")                                                                                             \
    WGMMA(wgmma_sp_rs_bf16_n##N, BFloat16, float, "+f", SP, RS, N, ".sp.sync.aligned.m64n" #N "k32.f32.bf16.bf16",    \
          ", 1, 1, 0")                                                                                                \
    WGMMA(wgmma_sp_ss_s8_n##N, int8_t, int32_t, "+r", SP, SS, N, ".sp.sync.aligned.m64n" #N "k64.s32.s8.s8", "")      \
    WGMMA(wgmma_sp_rs_s8_n##N, int8_t, int32_t, "+r", SP, RS, N, ".sp.sync.aligned.m64n" #N "k64.s32.s8.s8", "")
WGMMAS(64)
WGMMAS(128)
WGMMAS(256)
#endif

// Memory. Each block reads whole rows of 16-byte words, one a thread, of which DEPTH are under way at a time.

SB_DEVICE void keep(uint32_t (&sum)[4], const uint32_t (&x)[4]) {
    for (int i = 0; i < 4; ++i) sum[i] ^= x[i];
}

template <int DEPTH, Words4 (*LOAD)(const Words4*), bool COPY = false>
SB_DEVICE void memory_loop(const Loop& loop) {
    const size_t stride = size_t(gridDim.x) * blockDim.x, first = size_t(block_x()) * blockDim.x + thread_index();
    Words4 sum = {};
    const unsigned long long start = start_clock();
#pragma unroll 1
    for (int iteration = 0; iteration < loop.iterations; ++iteration) {
#pragma unroll 1
        for (int row = 0; row < loop.rows; row += DEPTH) {
            Words4 x[DEPTH];
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) x[i] = LOAD(loop.from + first + (row + i) * stride);
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                if constexpr (COPY)
                    store_global(loop.to + first + (row + i) * stride, x[i]);
                else
                    keep(sum.word, x[i].word);
            }
        }
    }
    stop_clock(loop, start);
    if (loop.keep) store_global(loop.to + first, sum);
}

// The second bound is what lets the compiler use the registers that DEPTH words take.
#define MEMORY_LOOP(NAME, THREADS, BLOCKS, ...)                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(Loop loop) { \
        memory_loop<__VA_ARGS__>(loop);                                             \
    }
MEMORY_LOOP(l2_read_cg, 512, 2, 4, load_from_l2)
MEMORY_LOOP(l2_read_nc, 512, 2, 4, load_weight)
MEMORY_LOOP(l2_weights_2, 256, 1, 2, load_weight)
MEMORY_LOOP(l2_weights_4, 256, 1, 4, load_weight)
MEMORY_LOOP(l2_weights_8, 256, 1, 8, load_weight)
MEMORY_LOOP(memory_read, 512, 2, 4, load_weight)
MEMORY_LOOP(memory_copy, 512, 2, 4, load_weight, true)

// Each warp reads 4 KiB of its own again and again.
constexpr int MATRICES = 8, MATRICES_BYTES = 512;

extern "C" __global__ void __launch_bounds__(512) shared_read(Loop loop) {
    uint8_t* from = shared_memory() + thread_index() / 32 * MATRICES * MATRICES_BYTES + thread_index() % 32 * 16;
    for (int i = 0; i < MATRICES; ++i)
        for (int j = 0; j < 4; ++j)
            reinterpret_cast<uint32_t*>(from + i * MATRICES_BYTES)[j] = mix(thread_index() * 32 + 4 * i + j);
    uint32_t sum[4] = {};
    const unsigned long long start = start_clock();
#pragma unroll 1
    for (int iteration = 0; iteration < loop.iterations; ++iteration) {
#pragma unroll
        for (int i = 0; i < MATRICES; ++i) {
            uint32_t x[4];
            load_matrices(x, from + i * MATRICES_BYTES);
            keep(sum, x);
        }
    }
    stop_clock(loop, start);
    if (loop.keep) keep(loop.to[thread_index()].word, sum);
}

extern "C" __global__ void random_fill(Words4* to, size_t count) {
    for (size_t i = size_t(block_x()) * blockDim.x + thread_index(); i < count; i += size_t(gridDim.x) * blockDim.x) {
        const uint32_t seed = uint32_t(i) * 4;
        store_global(to + i, {{mix(seed), mix(seed + 1), mix(seed + 2), mix(seed + 3)}});
    }
}

// Launches.

extern "C" __global__ void empty() {}

// Works for a while, as a kernel that needs what the one before it wrote: so it waits for that, then lets the next one
// begin, which waits in turn. Launched plainly, it does neither.
extern "C" __global__ void chain_link(int repeats, int dependent) {
#if PEAKS_CAPABILITY >= 90
    if (dependent) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    }
#endif
    for (int i = 0; i < repeats; ++i) {
        const long long start = clock64();
        while (clock64() - start < 8000) {
        }
    }
}

// Host side.

namespace {

thread_local std::string failure;

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or the next call would report it again
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
#define CHECK(CALL) check(CALL, #CALL)

// What goes over the C boundary: 0, or 1 with the reason in `failure`.
template <typename WORK>
int guarded(WORK work) {
    try {
        work();
        return 0;
    } catch (const std::exception& error) {
        failure = error.what();
        return 1;
    }
}

struct Event {
    cudaEvent_t event = nullptr;
    Event() { CHECK(cudaEventCreate(&event)); }
    ~Event() { cudaEventDestroy(event); }
    Event(const Event&) = delete;
};

template <typename T>
struct Buffer {
    T* data = nullptr;
    explicit Buffer(size_t count) { CHECK(cudaMalloc(&data, count * sizeof(T))); }
    ~Buffer() { cudaFree(data); }
    Buffer(const Buffer&) = delete;
};

struct Stream {
    cudaStream_t stream = nullptr;
    Stream() { CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
    ~Stream() { cudaStreamDestroy(stream); }
    Stream(const Stream&) = delete;
};

struct Graph {
    cudaGraphExec_t graph = nullptr;
    Graph(cudaStream_t stream, const std::function<void()>& calls) {
        cudaGraph_t recorded;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        calls();
        CHECK(cudaStreamEndCapture(stream, &recorded));
        const cudaError_t status = cudaGraphInstantiate(&graph, recorded, 0);
        cudaGraphDestroy(recorded);
        check(status, "cudaGraphInstantiate");
    }
    ~Graph() { cudaGraphExecDestroy(graph); }
    Graph(const Graph&) = delete;
};

// Microseconds of `work`, by events around it.
double timed(cudaStream_t stream, const std::function<void()>& work) {
    Event begin, end;
    CHECK(cudaEventRecord(begin.event, stream));
    work();
    CHECK(cudaEventRecord(end.event, stream));
    CHECK(cudaEventSynchronize(end.event));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin.event, end.event));
    return ms * 1e3;
}


enum class Place { NONE, L2, MEMORY };

// A loop: what it reads, and how much one iteration of `unit` threads does (of one thread and one row, if it reads
// memory): instructions, or bytes. Shared memory is `shared` bytes and `shared_unit` for each unit.
struct Entry {
    const char* name;
    void (*kernel)(Loop);
    Place place;
    int unit, amount;
    int depth;  // rows are a multiple of this
    int shared, shared_unit;
};

#define WARP(NAME) {#NAME, NAME, Place::NONE, 32, ROUNDS * TALL * WIDE, 1, 0, 0}
#define MEMORY(NAME, PLACE, BYTES, DEPTH) {#NAME, NAME, Place::PLACE, 1, BYTES, DEPTH, 0, 0}
#define WARPGROUP(FORM, SPARSE, A_UNIT, TYPE, N) \
    {"wgmma_" #FORM "_" #TYPE "_n" #N,           \
     wgmma_##FORM##_##TYPE##_n##N,               \
     Place::NONE,                                \
     128,                                        \
     CHAIN,                                      \
     1,                                          \
     1024 + B_BYTES<N, SPARSE>,                  \
     A_UNIT}
#define WARPGROUPS(FORM, SPARSE, A_UNIT)                                                           \
    WARPGROUP(FORM, SPARSE, A_UNIT, bf16, 64), WARPGROUP(FORM, SPARSE, A_UNIT, bf16, 128),         \
        WARPGROUP(FORM, SPARSE, A_UNIT, bf16, 256), WARPGROUP(FORM, SPARSE, A_UNIT, s8, 64),       \
        WARPGROUP(FORM, SPARSE, A_UNIT, s8, 128), WARPGROUP(FORM, SPARSE, A_UNIT, s8, 256)

const Entry ENTRIES[] = {
    WARP(mma_fp16),
    WARP(mma_bf16),
    WARP(mma_s8),
    WARP(mma_sp_fp16),
    WARP(mma_sp_bf16),
    WARP(mma_sp_s8),
    MEMORY(l2_read_cg, L2, 16, 4),
    MEMORY(l2_read_nc, L2, 16, 4),
    MEMORY(l2_weights_2, L2, 16, 2),
    MEMORY(l2_weights_4, L2, 16, 4),
    MEMORY(l2_weights_8, L2, 16, 8),
    MEMORY(memory_read, MEMORY, 16, 4),
    MEMORY(memory_copy, MEMORY, 32, 4),
    {"shared_read", shared_read, Place::NONE, 32, MATRICES * MATRICES_BYTES, 1, 0, MATRICES * MATRICES_BYTES},
#ifdef PEAKS_WGMMA
    WARPGROUPS(ss, false, A_BYTES),
    WARPGROUPS(rs, false, 0),
    WARPGROUPS(sp_ss, true, A_BYTES),
    WARPGROUPS(sp_rs, true, 0),
#endif
};

const Entry& entry_of(const char* name) {
    for (const Entry& entry : ENTRIES)
        if (!std::strcmp(entry.name, name)) return entry;
    throw std::runtime_error(std::string("peaks: no loop named ") + name);
}

int attribute(cudaDeviceAttr which) {
    int device, value;
    CHECK(cudaGetDevice(&device));
    CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
}

// Rows of `row_bytes` that fill a quarter of the L2, or much more of the memory than the L2 holds.
int rows_for(const Entry& entry, size_t row_bytes) {
    if (entry.place == Place::NONE) return 0;
    size_t free, total;
    CHECK(cudaMemGetInfo(&free, &total));
    const size_t bytes =
        entry.place == Place::L2 ? attribute(cudaDevAttrL2CacheSize) / 4 : std::min(size_t(1) << 30, free / 4);
    return std::max(1, int(bytes / row_bytes / entry.depth)) * entry.depth;
}

void run_loop(const Entry& entry, int threads, int blocks, int samples, double sample_us, double warm_us, double* us,
              double* amount, double* cycles) {
    const int grid = blocks * attribute(cudaDevAttrMultiProcessorCount);
    const size_t width = size_t(grid) * threads;
    const int rows = rows_for(entry, width * sizeof(Words4));
    const int shared = entry.shared + entry.shared_unit * (threads / entry.unit);
    CHECK(cudaFuncSetAttribute(entry.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    Stream stream;
    Buffer<Words4> from(std::max<size_t>(1, width * rows)), to(width * std::max(1, rows));
    Buffer<unsigned long long> clocks(grid);
    random_fill<<<grid, 256, 0, stream.stream>>>(from.data, width * rows);
    CHECK(cudaGetLastError());

    Loop loop{1, 0, rows, from.data, to.data, clocks.data};
    const auto sample = [&] {
        return timed(stream.stream, [&] {
            entry.kernel<<<grid, threads, shared, stream.stream>>>(loop);
            check(cudaGetLastError(), entry.name);
        });
    };
    sample();
    double found = sample();
    for (; found < sample_us / 4 && loop.iterations < 1 << 28; found = sample()) loop.iterations *= 2;
    loop.iterations = std::max(1, int(loop.iterations * sample_us / found));
    for (double spent = 0; spent < warm_us;) spent += sample();
    for (int i = 0; i < samples; ++i) us[i] = sample();

    std::vector<unsigned long long> counted(grid);
    CHECK(cudaMemcpy(counted.data(), clocks.data, grid * sizeof(counted[0]), cudaMemcpyDeviceToHost));
    std::nth_element(counted.begin(), counted.begin() + grid / 2, counted.end());
    *cycles = double(counted[grid / 2]);
    *amount = double(loop.iterations) * std::max(1, rows) * entry.amount * (threads / entry.unit) * blocks;
}

constexpr int LAUNCHES = 500, REPLAYS = 4, LINKS = 64;

void launch_link(cudaStream_t stream, int blocks, int repeats, bool dependent) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = 256;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = dependent;
    CHECK(cudaLaunchKernelEx(&config, chain_link, repeats, int(dependent)));
}

// Microseconds of LAUNCHES * REPLAYS empty kernels; or of LINKS kernels beyond those of one kernel that does the same
// work, which is LINKS - 1 times the gap between two. Either as calls in a stream or as a CUDA graph.
void run_launches(bool chain, bool graph, bool dependent, int samples, double* us, double* amount) {
    const int blocks = attribute(cudaDevAttrMultiProcessorCount);
    Stream stream;
    const auto calls = [&] {
        for (int i = 0; i < (chain ? LINKS : LAUNCHES); ++i) {
            if (chain)
                launch_link(stream.stream, blocks, 1, dependent);
            else
                empty<<<1, 32, 0, stream.stream>>>();
        }
        CHECK(cudaGetLastError());
    };
    const auto alone = [&] { launch_link(stream.stream, blocks, LINKS, false); };
    calls();
    alone();
    CHECK(cudaStreamSynchronize(stream.stream));
    std::unique_ptr<Graph> many, one;
    if (graph) {
        many.reset(new Graph(stream.stream, calls));
        one.reset(new Graph(stream.stream, alone));
    }
    const auto sample = [&](const std::unique_ptr<Graph>& recorded, const std::function<void()>& work) {
        return timed(stream.stream, [&] {
            for (int i = 0; i < (chain ? 1 : REPLAYS); ++i) {
                if (recorded)
                    CHECK(cudaGraphLaunch(recorded->graph, stream.stream));
                else
                    work();
            }
        });
    };
    for (int i = -3; i < samples; ++i) {
        const double found = sample(many, calls) - (chain ? sample(one, alone) : 0);
        if (i >= 0) us[i] = found;
    }
    *amount = chain ? LINKS - 1 : LAUNCHES * REPLAYS;
}

}  // namespace

// Each returns 0, or 1 when peaks_error() has the reason.

extern "C" const char* peaks_error() { return failure.c_str(); }

// The device that this thread measures from now on, and how many multiprocessors it has.
extern "C" int peaks_device(int device, int* multiprocessors) {
    return guarded([&] {
        CHECK(cudaSetDevice(device));
        *multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    });
}

// Runs a loop with `blocks` blocks on each multiprocessor until it has run for `warm_us`, then takes the samples.
// `amount` is what one multiprocessor does in a sample, `cycles` what it takes.
extern "C" int peaks_loop(const char* name, int threads, int blocks, int samples, double sample_us, double warm_us,
                          double* us, double* amount, double* cycles) {
    return guarded(
        [&] { run_loop(entry_of(name), threads, blocks, samples, sample_us, warm_us, us, amount, cycles); });
}

extern "C" int peaks_launches(int chain, int graph, int dependent, int samples, double* us, double* amount) {
    return guarded([&] { run_launches(chain, graph, dependent, samples, us, amount); });
}
