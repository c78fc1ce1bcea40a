// csrc/common/hopper.cuh for the CPU, as intrinsics.cuh beside this file is that of its namesake.
#pragma once

#include <common/intrinsics.cuh>
#include <common/products.cuh>

#define SB_LONE_KERNEL(threads) SB_KERNEL(threads)

namespace sparsebert {

constexpr bool ON_HOPPER = true;
inline void stop_kernel() {}

using simt::TensorMap;

struct alignas(8) Barrier {
    uint64_t state;
};

inline uint8_t* aligned_shared_memory() { return shared_memory(); }

inline void sync_warp() { simt::Machine::running->sync_warp(); }

inline void init_barrier(Barrier* barrier, int count) { simt::Machine::running->init_barrier(barrier, count); }
inline void fence_barrier_init() { simt::Machine::running->fence_barrier_init(); }
inline void arrive(Barrier* barrier) { simt::Machine::running->arrive("arrive", barrier, 0); }
inline void arrive_expect(Barrier* barrier, int bytes) {
    simt::Machine::running->arrive("arrive_expect", barrier, bytes);
}
inline void wait_barrier(Barrier* barrier, int parity) { simt::Machine::running->wait_barrier(barrier, parity); }
inline void sync_named(int id, int threads) { simt::Machine::running->sync_named(id, threads); }

inline void load_tile(void* shared, const TensorMap& map, int inner, int outer, Barrier* barrier) {
    simt::Machine::running->load_tile({"load_tile", map, inner, outer, static_cast<uint8_t*>(shared)}, barrier);
}
inline void load_bytes(void* shared, const void* global, int bytes, Barrier* barrier) {
    simt::Machine::running->load_tile(simt::BulkCopy::flat("load_bytes", global, bytes, shared), barrier);
}
inline void store_tile(const TensorMap& map, int inner, int outer, const void* shared) {
    auto* const from = static_cast<uint8_t*>(const_cast<void*>(shared));
    simt::Machine::running->store_tile({"store_tile", map, inner, outer, from});
}
inline void commit_stores() { simt::Machine::running->commit_stores(); }
template <int PENDING>
void wait_stores_read() {
    simt::Machine::running->wait_stores(PENDING);
}
template <int PENDING>
void wait_stores() {
    simt::Machine::running->wait_stores(PENDING);
}
inline void prefetch_map(const TensorMap& map) { simt::Machine::running->check_map("prefetch_map", map); }
inline void fence_async_proxy() { simt::Machine::running->fence_async_proxy(); }

inline int cluster_rank() { return simt::Machine::running->rank(); }
inline int cluster_blocks() { return simt::Machine::running->cluster_blocks(); }
inline void arrive_cluster() { simt::Machine::running->arrive_cluster(); }
inline void wait_cluster() { simt::Machine::running->wait_cluster(); }
inline uint32_t remote_address(const void* shared, int rank) {
    return simt::Machine::running->remote_address(shared, rank);
}
template <typename T>
T load_remote(uint32_t address) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 16, "one load");
    T value{};
    simt::Machine::running->load_remote(&value, address, sizeof(T));
    return value;
}
template <typename T>
void store_remote(uint32_t address, T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 16, "one store");
    simt::Machine::running->store_remote(address, &value, sizeof(T));
}
inline void arrive_remote(Barrier* barrier, int rank) {
    simt::Machine::running->arrive_remote("arrive_remote", barrier, rank, simt::Arrival::afar);
}
inline void release_remote(Barrier* barrier, int rank) {
    simt::Machine::running->arrive_remote("release_remote", barrier, rank, simt::Arrival::of_reads);
}
inline void wait_barrier_of_cluster(Barrier* barrier, int parity) {
    simt::Machine::running->wait_barrier_of_cluster(barrier, parity);
}
inline void load_tile_to_blocks(void* shared, const TensorMap& map, int inner, int outer, Barrier* barrier,
                                uint16_t blocks) {
    const simt::BulkCopy copy{"load_tile_to_blocks", map, inner, outer, static_cast<uint8_t*>(shared)};
    simt::Machine::running->load_tile_to_blocks(copy, barrier, blocks);
}

template <int COUNT>
void take_registers() {
    static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "what setmaxnreg takes");
    simt::Machine::running->meet_warpgroup(simt::set_registers);
}
template <int COUNT>
void give_registers() {
    take_registers<COUNT>();
}

// Each launch here is the only one.
inline void wait_for_previous_kernels() {}
inline void launch_next_kernel() {}

inline void store_matrices_transposed(void* row, const uint32_t (&fragment)[4]) {
    const simt::Row arguments{fragment, row};
    simt::Machine::running->meet(simt::store_matrices_transposed, &arguments);
}

}  // namespace sparsebert
