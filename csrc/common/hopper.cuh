// What Hopper adds (sm_90a): barriers in shared memory, copies of whole tiles, products of four warps, clusters. One
// function for each instruction, as in intrinsics.cuh, and like that with a version for the CPU in tests/simt/.
//
// Tiles and products go through the async proxy: what threads wrote to shared memory themselves it sees only after
// fence_async_proxy() by those threads, and a barrier.
#pragma once

#include <cuda.h>

#include <common/intrinsics.cuh>
#include <common/products.cuh>
#include <cstring>

// A kernel of which a multiprocessor runs one block at a time, so that its warpgroups may exchange registers.
#define SB_LONE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)

namespace sparsebert {

// Whether this is being compiled for Hopper. For other architectures its kernels only stop, with an error: setup.py compiles
// each source for all of them.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool ON_HOPPER = true;
#else
constexpr bool ON_HOPPER = false;
#endif

// A matrix in global memory and the box of it that a copy moves; a kernel's parameter, const and SB_PARAMETERS.
using TensorMap = CUtensorMap;

// Of the hardware's kind (mbarrier), in shared memory. A phase ends when all arrivals and all bytes that it expects are
// there; phases count from 0, and their parity tells one from the next.
struct alignas(8) Barrier {
    uint64_t state;
};

// The block's dynamic shared memory, as shared_memory(), where the pattern of a 128-byte swizzle can begin.
SB_DEVICE uint8_t* aligned_shared_memory() {
    extern __shared__ __align__(1024) uint8_t aligned_memory[];
    return aligned_memory;
}

// The lanes of a warp have arrived, and see what the others wrote: before one of them speaks for all.
SB_DEVICE void sync_warp() { __syncwarp(); }

// Barriers

// Each phase takes this many arrivals. Done by one thread, before any other uses it.
SB_DEVICE void init_barrier(Barrier* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// The async proxy, and other blocks of the cluster, see the barriers that this thread has initialized.
SB_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival: what this thread did before is seen by those who wait for the phase.
SB_DEVICE void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// The phase also waits for this many bytes of copies; then as arrive().
SB_DEVICE void arrive_expect(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Until the phase of this parity has ended: at once where the present phase has the other one.
SB_DEVICE void wait_barrier(Barrier* barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni ended;\n"
        "bra.uni again;\n"
        "ended:\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Barrier 1 to 15 of the block, for so many threads of it: some of the warps meet and the others go on.
SB_DEVICE void sync_named(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Copies by the hardware, each started by one thread. Elements of a tile are named by their place in the matrix,
// innermost first; what lies outside is zeros when loaded, and is not stored.

// The box at this place arrives at shared memory, 128-byte aligned (a swizzled one where its pattern begins), and its
// bytes at the barrier.
SB_DEVICE void load_tile(void* shared, const TensorMap& map, int inner, int outer, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
        "l"(&map), "r"(inner), "r"(outer), "r"(shared_address(barrier))
        : "memory");
}

// Consecutive bytes, 16-byte aligned and in multiples of 16, in the same way: what is packed needs no map.
SB_DEVICE void load_bytes(void* shared, const void* global, int bytes, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// The box in shared memory goes to this place of the matrix.
SB_DEVICE void store_tile(const TensorMap& map, int inner, int outer, const void* shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
                 "r"(inner), "r"(outer), "r"(shared_address(shared))
                 : "memory");
}

// Closes this thread's group of stores.
SB_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// All groups of this thread but the latest PENDING have been read: their shared memory may be written again.
template <int PENDING>
SB_DEVICE void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// All groups of this thread but the latest PENDING have been written.
template <int PENDING>
SB_DEVICE void wait_stores() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Fetches the map itself, so that the first copy does not wait for it.
SB_DEVICE void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// What this thread wrote to shared memory before is seen by copies and products that start after a barrier.
SB_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Clusters: blocks that run at the same time and reach each other's shared memory.

// Among the blocks of the cluster.
SB_DEVICE int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}
SB_DEVICE int cluster_blocks() {
    uint32_t blocks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return static_cast<int>(blocks);
}

// This thread has come to the cluster's barrier, and goes on; all threads of all blocks have come, and what they did
// before is seen. Before the first one the others may not run yet, after the last one they may be gone.
SB_DEVICE void arrive_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
SB_DEVICE void wait_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The same place in the shared memory of another block, for the functions below.
SB_DEVICE uint32_t remote_address(const void* shared, int rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
    return address;
}

// Four bytes there, or 16.
template <typename T>
SB_DEVICE T load_remote(uint32_t address) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 16, "one load");
    uint32_t words[sizeof(T) / 4];
    if constexpr (sizeof(T) == 4) {
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
    } else {
        asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(address)
                     : "memory");
    }
    T value;
    memcpy(&value, words, sizeof(T));
    return value;
}
template <typename T>
SB_DEVICE void store_remote(uint32_t address, T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 16, "one store");
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    if constexpr (sizeof(T) == 4) {
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(words[0]) : "memory");
    } else {
        asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]),
                     "r"(words[2]), "r"(words[3])
                     : "memory");
    }
}

// As arrive(), at the barrier in the same place of another block, or of this one, for wait_barrier_of_cluster(). It has
// the memory of the whole device catch up, so it is not for every stage of a loop.
SB_DEVICE void arrive_remote(Barrier* barrier, int rank) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote_address(barrier, rank))
                 : "memory");
}

// The same where nothing is told but that this thread no longer reads what copies will write next; for any wait.
SB_DEVICE void release_remote(Barrier* barrier, int rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote_address(barrier, rank)) : "memory");
}

// As wait_barrier(), and what threads of other blocks did before their arrivals is seen as well.
SB_DEVICE void wait_barrier_of_cluster(Barrier* barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni ended;\n"
        "bra.uni again;\n"
        "ended:\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// As load_tile(), to the same place of each block whose bit is set, with its bytes at the barrier in the same place
// there: one read of global memory for all.
SB_DEVICE void load_tile_to_blocks(void* shared, const TensorMap& map, int inner, int outer, Barrier* barrier,
                                   uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
        "l"(&map), "r"(inner), "r"(outer), "r"(shared_address(barrier)), "h"(blocks)
        : "memory");
}

// Registers, launches

SB_DEVICE void stop_kernel() { asm volatile("trap;"); }

// All warps of a warpgroup from now on have COUNT registers a thread, which others have given.
template <int COUNT>
SB_DEVICE void take_registers() {
    static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "what setmaxnreg takes");
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
SB_DEVICE void give_registers() {
    static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "what setmaxnreg takes");
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// The kernels before this one in the stream have ended, where this one was launched early to prepare itself.
SB_DEVICE void wait_for_previous_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel in the stream may begin to prepare itself once all blocks have said so.
SB_DEVICE void launch_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements, each stored transposed: lane i names row i % 8 of matrix i / 8 (16 bytes,
// aligned), and has elements g of rows 2q and 2q + 1 of each. So sums, whose rows are features, become rows of tokens.
SB_DEVICE void store_matrices_transposed(void* row, const uint32_t (&fragment)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
                 : "memory");
}

}  // namespace sparsebert
