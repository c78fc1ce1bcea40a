// Small kernels on common/hopper.cuh, for the CPU and the GPU: right ones, and, by a parameter, with one mistake each.
#pragma once

#include <common/hopper.cuh>

namespace sparsebert::hopper {

enum class Mistake {
    none,
    no_init_fence,
    no_sync_after_init,
    no_wait_for_tile,
    wrong_parity,
    no_wait_for_readers,
    arrival_of_each_lane,
    arrival_missing,
    arrival_before_reading,
    arrival_without_sync_warp,
    more_bytes_expected,
    less_bytes_expected,
    no_bytes_expected,
    tile_of_nobody,
    no_proxy_fence,
    proxy_fence_by_reader,
    no_sync_before_store,
    no_wait_for_store,
    store_not_waited_for,
    store_not_committed,
    named_barrier_too_wide,
    named_barriers_differ,
    named_barrier_too_narrow,
};

struct Tiles {
    static constexpr int ROWS = 16;
    static constexpr int COLUMNS = 64;  // of 16 bits: 128 bytes
    static constexpr int BYTES = ROWS * COLUMNS * 2;
    static constexpr int STAGES = 2;
    static constexpr int READERS = 2;  // warps
    static constexpr int THREADS = 32 * (READERS + 1);
    // Stages, the tile that is stored, and the barriers.
    static constexpr int SHARED = (STAGES + 1) * BYTES + 2 * STAGES * 8;
};

// Where row's 16-byte chunk lies in a tile with a 128-byte swizzle.
SB_DEVICE Words4* chunk_of(uint8_t* tile, int row, int chunk) {
    return reinterpret_cast<Words4*>(tile + row * 128) + (chunk ^ row % 8);
}

// y = x by tiles: one warp loads them, the others copy them within shared memory, and one thread of these stores them.
template <Mistake MISTAKE>
class TileCopy {
    using Shape = Tiles;
    const TensorMap& x;
    const TensorMap& y;
    const int row_tiles;
    uint8_t* const shared = aligned_shared_memory();
    uint8_t* const out = shared + Shape::STAGES * Shape::BYTES;
    Barrier* const full = reinterpret_cast<Barrier*>(out + Shape::BYTES);
    Barrier* const empty = full + Shape::STAGES;
    const int warp = thread_index() / 32;
    const int lane = thread_index() % 32;

    SB_DEVICE static constexpr bool is(Mistake mistake) { return MISTAKE == mistake; }

  public:
    SB_DEVICE TileCopy(const TensorMap& x, const TensorMap& y, int row_tiles) : x(x), y(y), row_tiles(row_tiles) {}

    SB_DEVICE void run() {
        if (thread_index() == 0) {
            prefetch_map(x);
            prefetch_map(y);
            for (int i = 0; i < Shape::STAGES; ++i) {
                init_barrier(full + i, 1);
                init_barrier(empty + i, Shape::READERS);
            }
            if (!is(Mistake::no_init_fence)) fence_barrier_init();
        }
        if (!is(Mistake::no_sync_after_init)) sync_block();
        wait_for_previous_kernels();
        if (warp == Shape::READERS) {
            if (lane == 0) load();
        } else {
            copy();
        }
        launch_next_kernel();
    }

  private:
    SB_DEVICE uint8_t* stage(int tile) { return shared + tile % Shape::STAGES * Shape::BYTES; }
    SB_DEVICE static int parity(int tile) { return tile / Shape::STAGES % 2; }

    SB_DEVICE void load() {
        for (int tile = 0; tile < row_tiles; ++tile) {
            const int i = tile % Shape::STAGES;
            // The first time round there is nothing to wait for.
            if (!is(Mistake::no_wait_for_readers)) wait_barrier(empty + i, parity(tile) ^ 1);
            const int bytes = Shape::BYTES + (is(Mistake::more_bytes_expected)   ? 16
                                              : is(Mistake::less_bytes_expected) ? -16
                                                                                 : 0);
            if (is(Mistake::no_bytes_expected)) {
                arrive(full + i);
            } else {
                arrive_expect(full + i, bytes);
            }
            load_tile(stage(tile), x, block_x() * Shape::COLUMNS, tile * Shape::ROWS, full + i);
        }
        if (is(Mistake::tile_of_nobody)) {
            const int i = row_tiles % Shape::STAGES;
            wait_barrier(empty + i, parity(row_tiles) ^ 1);
            arrive_expect(full + i, Shape::BYTES);
            load_tile(stage(row_tiles), x, 0, 0, full + i);
        }
    }

    SB_DEVICE void copy() {
        for (int tile = 0; tile < row_tiles; ++tile) {
            const int i = tile % Shape::STAGES;
            if (!is(Mistake::no_wait_for_tile)) wait_barrier(full + i, parity(tile) ^ is(Mistake::wrong_parity));
            if (is(Mistake::arrival_before_reading)) release(i);
            // The store of the tile before has been read.
            if (thread_index() == 0 && !is(Mistake::no_wait_for_store)) wait_stores_read<0>();
            sync_readers();
            for (int k = thread_index(); k < Shape::ROWS * 8; k += 32 * Shape::READERS) {
                store_shared(chunk_of(out, k / 8, k % 8), load_shared(chunk_of(stage(tile), k / 8, k % 8)));
            }
            if (!is(Mistake::no_proxy_fence) && !is(Mistake::proxy_fence_by_reader)) fence_async_proxy();
            if (!is(Mistake::arrival_before_reading)) release(i);
            if (!is(Mistake::no_sync_before_store)) sync_readers();
            if (thread_index() == 0) store(tile);
        }
        if (thread_index() == 0 && !is(Mistake::store_not_waited_for) && !is(Mistake::no_wait_for_store)) {
            wait_stores<0>();
        }
    }

    SB_DEVICE void release(int i) {
        if (!is(Mistake::arrival_without_sync_warp)) sync_warp();
        const bool speaks = lane == 0 && !(is(Mistake::arrival_missing) && warp == 1);
        if (speaks || is(Mistake::arrival_of_each_lane)) arrive(empty + i);
    }

    SB_DEVICE void sync_readers() {
        constexpr int threads = 32 * Shape::READERS;
        if (is(Mistake::named_barrier_too_wide)) return sync_named(1, threads + 32);
        if (is(Mistake::named_barrier_too_narrow)) return sync_named(1, threads - 32);
        sync_named(1, is(Mistake::named_barriers_differ) ? threads + 32 * warp : threads);
    }

    SB_DEVICE void store(int tile) {
        if (is(Mistake::proxy_fence_by_reader)) fence_async_proxy();
        store_tile(y, block_x() * Shape::COLUMNS, tile * Shape::ROWS, out);
        if (!is(Mistake::store_not_committed)) commit_stores();
    }
};

template <Mistake MISTAKE>
SB_KERNEL(Tiles::THREADS) tile_copy(const SB_PARAMETERS TensorMap x, const SB_PARAMETERS TensorMap y, int row_tiles) {
    TileCopy<MISTAKE>(x, y, row_tiles).run();
}

// A box to shared memory, and what lies there then to global memory: box_bytes a block, after a barrier of 16 bytes.
SB_KERNEL(32) dump_tile(const SB_PARAMETERS TensorMap x, Words4* to, int bytes, int inner, int outer) {
    uint8_t* const shared = aligned_shared_memory();
    auto* const barrier = reinterpret_cast<Barrier*>(shared + bytes);
    if (thread_index() == 0) {
        init_barrier(barrier, 1);
        fence_barrier_init();
        arrive_expect(barrier, bytes);
        load_tile(shared, x, inner, outer, barrier);
    }
    sync_warp();
    wait_barrier(barrier, 0);
    for (int i = thread_index(); i < bytes / 16; i += 32) {
        store_global(to + i, load_shared(reinterpret_cast<Words4*>(shared) + i));
    }
}

// y = x, in two pieces that arrive at one barrier.
SB_LONE_KERNEL(128) packed_copy(const Words4* x, Words4* y, int bytes) {
    uint8_t* const shared = aligned_shared_memory();
    auto* const barrier = reinterpret_cast<Barrier*>(shared + bytes);
    if (thread_index() == 0) {
        init_barrier(barrier, 2);
        fence_barrier_init();
    }
    sync_block();
    give_registers<64>();
    take_registers<128>();
    if (thread_index() % 32 == 0 && thread_index() < 64) {
        const int half = bytes / 2, at = thread_index() / 32 * half;
        arrive_expect(barrier, half);
        load_bytes(shared + at, reinterpret_cast<const uint8_t*>(x) + at, half, barrier);
    }
    wait_barrier(barrier, 0);
    for (int i = thread_index(); i < bytes / 16; i += 128) {
        store_global(y + i, load_shared(reinterpret_cast<Words4*>(shared) + i));
    }
}

// Each 8 x 8 matrix of 16 bits of x, transposed.
SB_KERNEL(32) transposed(const Words4* x, Words4* y) {
    auto* const rows = reinterpret_cast<Words4*>(aligned_shared_memory());
    const int lane = thread_index();
    store_shared(rows + lane, load_global(x + lane));
    sync_warp();
    uint32_t fragment[4];
    load_matrices(fragment, rows + lane);
    sync_warp();
    store_matrices_transposed(rows + lane, fragment);
    sync_warp();
    store_global(y + lane, load_shared(rows + lane));
}

// Products

enum class Slip {
    none,
    no_start,
    sums_read_early,
    sums_written_early,
    sums_written_after_start,
    fragments_written_early,
    stage_released_early,
    tile_waited_for_by_three_warps,
    three_warps,
    descriptors_differ,
    descriptor_across_rows,
    descriptor_between_rows,
    stride_odd,
    not_committed,
    not_waited_for,
    rewritten,
    rewritten_without_fence,
    rewritten_without_barrier,
};

// Sums of 64 rows of A times N rows of B, which lie along k, as many stages of 128 bytes of B's rows as are asked for.
// Lanes' sums begin as they are in `sums`, or as zeros, and end there: [N / 2][128].
template <typename T, int N, bool SPARSE, bool FRAGMENTS, int SELECTOR = 0, Slip SLIP = Slip::none>
class Products {
  public:
    static constexpr int STAGES = 2;
    static constexpr int STEPS = SPARSE ? 2 : 4;
    static constexpr int A_ROW = 32 * STEPS;  // bytes of a stage
    static constexpr int B_ROW = 128;
    static constexpr int A_BYTES = FRAGMENTS ? 0 : 64 * A_ROW;
    static constexpr int B_BYTES = N * B_ROW;
    static constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
    static constexpr int SHARED = STAGES * STAGE_BYTES + 2 * STAGES * 8;
    static constexpr int THREADS = 160;

    struct Parameters {
        const Words4* fragments;   // [stages][STEPS][128], or null
        const uint32_t* metadata;  // [stages][STEPS][128], or null
        SumOf<T>* sums;
        int stages;
        bool add;
    };

    SB_DEVICE Products(const TensorMap& a, const TensorMap& b, const Parameters& p) : a(a), b(b), p(p) {}

    SB_DEVICE void run() {
        if (thread_index() == 0) {
            for (int i = 0; i < STAGES; ++i) {
                init_barrier(full + i, 1);
                init_barrier(empty + i, 4);
            }
            fence_barrier_init();
        }
        sync_block();
        if (warp == 4) {
            if (thread_index() % 32 == 0) load();
        } else if (!(is(Slip::three_warps) && warp == 3)) {
            multiply();
        }
    }

  private:
    const TensorMap& a;
    const TensorMap& b;
    const Parameters& p;
    uint8_t* const shared = aligned_shared_memory();
    Barrier* const full = reinterpret_cast<Barrier*>(shared + STAGES * STAGE_BYTES);
    Barrier* const empty = full + STAGES;
    const int warp = thread_index() / 32;

    SB_DEVICE static constexpr bool is(Slip slip) { return SLIP == slip; }
    SB_DEVICE uint8_t* place_of(int stage) { return shared + stage % STAGES * STAGE_BYTES; }
    SB_DEVICE static int parity(int stage) { return stage / STAGES % 2; }

    SB_DEVICE void load() {
        for (int stage = 0; stage < p.stages; ++stage) {
            const int i = stage % STAGES;
            wait_barrier(empty + i, parity(stage) ^ 1);
            arrive_expect(full + i, STAGE_BYTES);
            constexpr int SIZE = sizeof(T);
            load_tile(place_of(stage), b, stage * B_ROW / SIZE, 0, full + i);
            if (!FRAGMENTS) load_tile(place_of(stage) + B_BYTES, a, stage * A_ROW / SIZE, 0, full + i);
        }
    }

    SB_DEVICE void multiply() {
        SumOf<T> d[N / 2];
        SumOf<T> early{};
        Words4 fragments[STEPS] = {};
        uint32_t metadata[STEPS] = {};
#pragma unroll
        for (int i = 0; i < N / 2; ++i) d[i] = load_global(p.sums + i * 128 + thread_index());
        for (int stage = 0; stage < p.stages; ++stage) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const int at = (stage * STEPS + step) * 128 + thread_index();
                if (FRAGMENTS) fragments[step] = load_global(p.fragments + at);
                if (SPARSE) metadata[step] = load_global(p.metadata + at);
            }
            const bool waits = !(is(Slip::tile_waited_for_by_three_warps) && warp == 3);
            if (waits) wait_barrier(full + stage % STAGES, parity(stage));
            if (is(Slip::rewritten) || is(Slip::rewritten_without_fence) || is(Slip::rewritten_without_barrier)) {
                rewrite(stage);
            }
            if (!is(Slip::no_start)) start_products();
            if (is(Slip::sums_written_after_start) && stage) d[0] += 1;
            multiply_stage(stage, d, fragments, metadata);
            if (!is(Slip::not_committed)) commit_products();
            if (is(Slip::sums_read_early)) early = d[0];
            if (is(Slip::sums_written_early)) d[0] = early;
            if (is(Slip::fragments_written_early)) fragments[0] = Words4{};
            if (is(Slip::stage_released_early)) release(stage);
            if (is(Slip::not_waited_for)) {
                continue;
            } else if (FRAGMENTS || is(Slip::stage_released_early)) {
                wait_products<0>(d);
                if (FRAGMENTS) release(stage);
            } else {
                // The one before has ended.
                wait_products<1>();
                if (stage) release(stage - 1);
            }
        }
        if (!is(Slip::not_waited_for)) wait_products<0>(d);
        if (is(Slip::sums_read_early)) d[0] = early;
#pragma unroll
        for (int i = 0; i < N / 2; ++i) store_global(p.sums + i * 128 + thread_index(), d[i]);
    }

    SB_DEVICE void release(int stage) {
        if (thread_index() % 32 == 0) arrive(empty + stage % STAGES);
    }

    // Writes to B what is there, through registers.
    SB_DEVICE void rewrite(int stage) {
        auto* const chunk = reinterpret_cast<Words4*>(place_of(stage));
        if (thread_index() == 0) {
            store_shared(chunk, load_shared(chunk));
            if (!is(Slip::rewritten_without_fence)) fence_async_proxy();
        }
        if (!is(Slip::rewritten_without_barrier)) sync_named(1, 128);
    }

    SB_DEVICE void multiply_stage(int stage, SumOf<T> (&d)[N / 2], const Words4 (&fragments)[STEPS],
                                  const uint32_t (&metadata)[STEPS]) {
        constexpr Swizzle A_SWIZZLE = SPARSE ? Swizzle::bytes64 : Swizzle::bytes128;
        const uint32_t of_b = shared_address(place_of(stage)), of_a = of_b + B_BYTES;
        const int shift = is(Slip::descriptor_across_rows) ? 96 : is(Slip::descriptor_between_rows) ? 128 : 0;
        const uint64_t b_tile = describe_tile(of_b + shift, 16, is(Slip::stride_odd) ? 512 : 1024, Swizzle::bytes128);
        const uint64_t a_tile = describe_tile(of_a, 16, 8 * A_ROW, A_SWIZZLE);
        const int apart = is(Slip::descriptors_differ) && warp == 1 ? 32 : 0;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const uint64_t b_step = move_tile(b_tile, step * 128 / STEPS + apart);
            const uint64_t a_step = move_tile(a_tile, step * 32);
            const bool add = p.add || stage || step;
            if constexpr (SPARSE && FRAGMENTS) {
                multiply_sparse_tile<T, N, SELECTOR>(d, fragments[step].word, b_step, metadata[step], add);
            } else if constexpr (SPARSE) {
                multiply_sparse_tile<T, N, SELECTOR>(d, a_step, b_step, metadata[step], add);
            } else if constexpr (FRAGMENTS) {
                multiply_tile<T, N>(d, fragments[step].word, b_step, add);
            } else {
                multiply_tile<T, N>(d, a_step, b_step, add);
            }
        }
    }
};

template <typename Kernel>
SB_KERNEL(Kernel::THREADS)
products(const SB_PARAMETERS TensorMap a, const SB_PARAMETERS TensorMap b,
         const SB_PARAMETERS typename Kernel::Parameters p) {
    Kernel(a, b, p).run();
}

// One product without a swizzle: cores of 8 rows and 16 bytes, those along k beside each other.
SB_KERNEL(128) plain_product(const Words4* a, const Words4* b, float* sums) {
    constexpr int N = 8;
    auto* const of_a = reinterpret_cast<Words4*>(aligned_shared_memory());
    Words4* const of_b = of_a + 128;
    const int t = thread_index();
    // Chunk t % 2 of row t / 2.
    store_shared(of_a + t / 16 * 16 + t % 2 * 8 + t / 2 % 8, load_global(a + t));
    if (t < 2 * N) store_shared(of_b + t % 2 * 8 + t / 2, load_global(b + t));
    fence_async_proxy();
    sync_block();
    float d[N / 2];
    start_products();
    multiply_tile<Half, N>(d, describe_tile(shared_address(of_a), 128, 256, Swizzle::none),
                           describe_tile(shared_address(of_b), 128, 256, Swizzle::none), false);
    commit_products();
    wait_products<0>(d);
    for (int i = 0; i < N / 2; ++i) store_global(sums + i * 128 + t, d[i]);
}

// Clusters

enum class Fault {
    none,
    no_first_barrier,
    no_middle_barrier,
    no_last_barrier,
    no_wait,
    rank_outside,
    tile_of_one_block,
    no_remote_release,
    no_wait_for_readers,
    wait_for_block_only,
    only_released,
    no_init_fence,
};

// y = x, where each block writes what its neighbour has given it, and then reads from it.
template <Fault FAULT>
SB_KERNEL(64) exchange(const uint32_t* x, uint32_t* y) {
    constexpr int THREADS = 64;
    auto* const words = reinterpret_cast<uint32_t*>(aligned_shared_memory());
    const int t = thread_index(), blocks = cluster_blocks(), next = (cluster_rank() + 1) % blocks;
    const int first = block_x() - cluster_rank();
    if (FAULT != Fault::no_first_barrier) {
        arrive_cluster();
        wait_cluster();
    }
    const int rank = FAULT == Fault::rank_outside ? blocks : next;
    store_remote(remote_address(words + t, rank), load_global(x + (first + next) * THREADS + t));
    if (FAULT != Fault::no_middle_barrier) {
        arrive_cluster();
        if (FAULT != Fault::no_wait) wait_cluster();
    }
    store_global(y + 2 * block_x() * THREADS + t, load_shared(words + THREADS - 1 - t));
    const Words4 four = load_remote<Words4>(remote_address(words + t / 4 * 4, next));
    store_global(y + (2 * block_x() + 1) * THREADS + t, four.word[0] + four.word[3]);
    if (FAULT != Fault::no_last_barrier) {
        arrive_cluster();
        wait_cluster();
    }
}

// y = x, where each block writes what its neighbour has given it and told it of.
template <Fault FAULT>
SB_KERNEL(64) handover(const uint32_t* x, uint32_t* y) {
    constexpr int THREADS = 64;
    auto* const words = reinterpret_cast<uint32_t*>(aligned_shared_memory());
    auto* const barrier = reinterpret_cast<Barrier*>(words + THREADS);
    const int t = thread_index(), next = (cluster_rank() + 1) % cluster_blocks();
    if (t == 0) {
        init_barrier(barrier, THREADS);
        if (FAULT != Fault::no_init_fence) fence_barrier_init();
    }
    arrive_cluster();
    wait_cluster();
    store_remote(remote_address(words + t, next), load_global(x + block_x() * THREADS + t));
    if (FAULT == Fault::only_released) {
        release_remote(barrier, next);
    } else {
        arrive_remote(barrier, next);
    }
    if (FAULT == Fault::wait_for_block_only) {
        wait_barrier(barrier, 0);
    } else {
        wait_barrier_of_cluster(barrier, 0);
    }
    const int previous = block_x() - cluster_rank() + (cluster_rank() + cluster_blocks() - 1) % cluster_blocks();
    store_global(y + previous * THREADS + t, load_shared(words + THREADS - 1 - t));
    arrive_cluster();
    wait_cluster();
}

struct Multicast {
    static constexpr int ROWS = 8;  // that a block loads for all
    static constexpr int STAGES = 2;
    static constexpr int THREADS = 96;
    static constexpr int BLOCKS = 2;
    static constexpr int STAGE_BYTES = BLOCKS * ROWS * 128;
    static constexpr int SHARED = STAGES * STAGE_BYTES + 2 * STAGES * 8;
};

// Each of two blocks reads all of x, of which each loads one half, for both; y: [blocks][rows][8].
template <Fault FAULT>
SB_KERNEL(Multicast::THREADS) multicast(const SB_PARAMETERS TensorMap x, Words4* y, int tiles) {
    using Shape = Multicast;
    uint8_t* const shared = aligned_shared_memory();
    auto* const full = reinterpret_cast<Barrier*>(shared + Shape::STAGES * Shape::STAGE_BYTES);
    Barrier* const empty = full + Shape::STAGES;
    const int warp = thread_index() / 32, lane = thread_index() % 32, rank = cluster_rank();
    if (thread_index() == 0) {
        for (int i = 0; i < Shape::STAGES; ++i) {
            init_barrier(full + i, 1);
            init_barrier(empty + i, 2 * Shape::BLOCKS);
        }
        fence_barrier_init();
    }
    arrive_cluster();
    wait_cluster();
    for (int tile = 0; tile < tiles; ++tile) {
        const int i = tile % Shape::STAGES, parity = tile / Shape::STAGES % 2;
        uint8_t* const stage = shared + i * Shape::STAGE_BYTES;
        if (warp == 2) {
            if (lane) continue;
            if (FAULT != Fault::no_wait_for_readers) wait_barrier(empty + i, parity ^ 1);
            arrive_expect(full + i, Shape::STAGE_BYTES);
            const int half = rank * Shape::ROWS;
            const uint16_t blocks = FAULT == Fault::tile_of_one_block ? 1 << rank : (1 << Shape::BLOCKS) - 1;
            load_tile_to_blocks(stage + half * 128, x, 0, tile * Shape::BLOCKS * Shape::ROWS + half, full + i, blocks);
            continue;
        }
        wait_barrier(full + i, parity);
        for (int k = thread_index(); k < Shape::STAGE_BYTES / 16; k += 64) {
            Words4* const to = y + (rank * tiles + tile) * (Shape::STAGE_BYTES / 16);
            store_global(to + k, load_shared(reinterpret_cast<Words4*>(stage + k / 8 * 128) + (k % 8 ^ k / 8 % 8)));
        }
        sync_warp();
        if (lane < Shape::BLOCKS && !(FAULT == Fault::no_remote_release && lane != rank)) {
            release_remote(empty + i, lane);
        }
    }
    // Nobody's shared memory goes while the other may still write there.
    sync_warp();
    if (FAULT != Fault::no_last_barrier) {
        arrive_cluster();
        wait_cluster();
    }
}

}  // namespace sparsebert::hopper
