// Kernels for the tests of the machine itself: some that are right, and some with one mistake each.
#include <pybind11/pybind11.h>

#include <common/intrinsics.cuh>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simt.hpp"

namespace sparsebert {
namespace {

constexpr int THREADS = 64;
constexpr int STAGES = 3;
constexpr int STEPS = 8;
constexpr int SHARED = STAGES * THREADS * 16;
// What every case below is given: x and y of BLOCKS * STEPS * THREADS words of 16 bytes, y as an output, and scratch
// of as many; and counters, which are zeros.
constexpr int BLOCKS = 3;
constexpr int WORDS = BLOCKS * STEPS * THREADS;

struct Buffers {
    const Words4* x;
    Words4* y;
    Words4* scratch;
    uint32_t* counters;
};

Words4* stage(int i) { return reinterpret_cast<Words4*>(shared_memory()) + i % STAGES * THREADS; }
int at(int step) { return (block_x() * STEPS + step) * THREADS; }
int neighbour() { return (thread_index() + 32) % THREADS; }

SB_KERNEL(THREADS) copy(Buffers p) {
    for (int step = 0; step < STEPS; ++step) {
        const int i = at(step) + thread_index();
        store_global(p.y + i, load_global(p.x + i));
    }
}

SB_KERNEL(THREADS) copy_bytes(Buffers p) {
    const int bytes = STEPS * THREADS * 16;
    for (int i = thread_index(); i < bytes; i += THREADS) {
        const int byte = block_x() * bytes + i;
        store_global(reinterpret_cast<uint8_t*>(p.y) + byte, load_global(reinterpret_cast<const uint8_t*>(p.x) + byte));
    }
}

// Each thread writes what another one copied, stage by stage.
template <typename Wait>
void pipeline(Buffers p, Wait wait, bool sync_after_wait, bool late_copy) {
    const int t = thread_index();
    const auto start = [&](int step) {
        if (step < STEPS) copy_async<16>(stage(step) + t, p.x + at(step) + t, 16);
        commit_copies();
    };
    for (int step = 0; step < STAGES - late_copy; ++step) start(step);
    for (int step = 0; step < STEPS; ++step) {
        wait();
        if (sync_after_wait) sync_block();
        // Whoever has passed the barrier has read the stage that is now overwritten.
        if (late_copy) start(step + STAGES - 1);
        store_global(p.y + at(step) + neighbour(), load_shared(stage(step) + neighbour()));
        if (!late_copy) start(step + STAGES);
    }
}

SB_KERNEL(THREADS) pipelined_copy(Buffers p) {
    pipeline(p, [] { wait_copies<STAGES - 2>(); }, true, true);
}
SB_KERNEL(THREADS) missing_wait(Buffers p) {
    pipeline(p, [] {}, true, true);
}
SB_KERNEL(THREADS) weak_wait(Buffers p) {
    pipeline(p, [] { wait_copies<STAGES - 1>(); }, true, true);
}
SB_KERNEL(THREADS) missing_sync_after_wait(Buffers p) {
    pipeline(p, [] { wait_copies<STAGES - 2>(); }, false, true);
}
// The stage that has just been read is filled again, where another thread may still be reading.
SB_KERNEL(THREADS) missing_sync_before_copy(Buffers p) {
    pipeline(p, [] { wait_copies<STAGES - 1>(); }, true, false);
}
SB_KERNEL(THREADS) pending_copies(Buffers p) {
    copy(p);
    copy_async<16>(stage(0) + thread_index(), p.x + thread_index(), 16);
    commit_copies();
}
SB_KERNEL(THREADS) uncommitted_copies(Buffers p) {
    copy(p);
    copy_async<16>(stage(0) + thread_index(), p.x + thread_index(), 16);
    wait_copies<0>();
}
SB_KERNEL(THREADS) copy_to_misaligned(Buffers p) {
    copy(p);
    copy_async<16>(shared_memory() + 8 + 16 * thread_index(), p.x + thread_index(), 16);
    commit_copies();
    wait_copies<0>();
}
SB_KERNEL(THREADS) copy_from_misaligned(Buffers p) {
    copy(p);
    copy_async<16>(stage(0) + thread_index(), reinterpret_cast<const uint8_t*>(p.x) + 4, 16);
    commit_copies();
    wait_copies<0>();
}
SB_KERNEL(THREADS) copy_from_outside(Buffers p) {
    copy(p);
    copy_async<16>(stage(0) + thread_index(), p.x + WORDS - 1 + thread_index(), 16);
    commit_copies();
    wait_copies<0>();
}
SB_KERNEL(THREADS) copy_too_much(Buffers p) {
    copy(p);
    copy_async<8>(stage(0) + thread_index(), p.x, 12);
    commit_copies();
    wait_copies<0>();
}

// Thread t of block b leaves the first t % (BYTES + 1) bytes of a row of x, and zeros.
template <int BYTES>
SB_KERNEL(THREADS) partial_copy(Buffers p) {
    copy(p);
    sync_block();
    const int t = thread_index(), valid = t % (BYTES + 1);
    const Words4* const from = valid ? p.x + t : p.x + WORDS;  // nothing is read there
    copy_async<BYTES>(stage(0) + t, from, valid);
    commit_copies();
    wait_copies<0>();
    Words4 word{};
    for (int i = 0; i < BYTES / 4; ++i) word.word[i] = load_shared(reinterpret_cast<uint32_t*>(stage(0) + t) + i);
    store_global(p.scratch + block_x() * THREADS + t, word);
}

// The sum of the block's words in x, through shared memory, to the first word of scratch that is the block's.
SB_KERNEL(THREADS) reduction(Buffers p) {
    copy(p);
    uint32_t* const sums = reinterpret_cast<uint32_t*>(shared_memory());
    const int t = thread_index();
    uint32_t sum = 0;
    for (int step = 0; step < STEPS; ++step) {
        for (const uint32_t word : load_global(p.x + at(step) + t).word) sum += word;
    }
    store_shared(sums + t, sum);
    for (int width = THREADS / 2; width > 0; width /= 2) {
        sync_block();
        if (t < width) store_shared(sums + t, load_shared(sums + t) + load_shared(sums + t + width));
    }
    if (t == 0) store_global(reinterpret_cast<uint32_t*>(p.scratch) + block_x(), load_shared(sums));
}

// The last block to arrive sums what the blocks left in scratch, thread by thread.
template <bool FENCE, bool LATE_FENCE, bool COHERENT>
SB_KERNEL(THREADS) split(Buffers p) {
    copy(p);
    const int t = thread_index();
    uint32_t* const before = reinterpret_cast<uint32_t*>(shared_memory());
    store_global(p.scratch + block_x() * THREADS + t, load_global(p.x + at(0) + t));
    if (FENCE) fence_device();
    sync_block();
    if (t == 0) store_shared(before, atomic_add(p.counters, 1));
    if (LATE_FENCE) fence_device();
    sync_block();
    if (load_shared(before) != BLOCKS - 1) return;
    Words4 sum{};
    for (int block = 0; block < BLOCKS; ++block) {
        const Words4* const from = p.scratch + block * THREADS + t;
        const Words4 word = COHERENT ? load_from_l2(from) : load_global(from);
        for (int i = 0; i < 4; ++i) sum.word[i] += word.word[i];
    }
    store_global(p.scratch + BLOCKS * THREADS + t, sum);
    if (t == 0) store_global(p.counters, 0u);
}

// One thread's fence for the whole block.
SB_KERNEL(THREADS) split_with_one_fence(Buffers p) {
    copy(p);
    const int t = thread_index();
    uint32_t* const before = reinterpret_cast<uint32_t*>(shared_memory());
    store_global(p.scratch + block_x() * THREADS + t, load_global(p.x + at(0) + t));
    sync_block();
    if (t == 0) {
        fence_device();
        store_shared(before, atomic_add(p.counters, 1));
    }
    sync_block();
    if (load_shared(before) != BLOCKS - 1) return;
    for (int block = 0; block < BLOCKS; ++block) {
        store_global(p.scratch + (BLOCKS + block) * THREADS + t, load_from_l2(p.scratch + block * THREADS + t));
    }
}

SB_KERNEL(THREADS) uninitialized_shared(Buffers p) {
    copy(p);
    const int t = thread_index();
    if (t) store_shared(stage(0) + t, load_global(p.x + t));
    sync_block();
    store_global(p.scratch + at(0) + t, load_shared(stage(0) + t));
}
// The first block initializes what the second finds.
SB_KERNEL(THREADS) shared_of_another_block(Buffers p) {
    copy(p);
    if (block_x() == 0) store_shared(stage(0) + thread_index(), Words4{});
    store_global(p.scratch + at(0) + thread_index(), load_shared(stage(0) + thread_index()));
}
SB_KERNEL(THREADS) race_read(Buffers p) {
    copy(p);
    store_shared(stage(0) + thread_index(), Words4{});
    store_global(p.scratch + at(0) + thread_index(), load_shared(stage(0) + neighbour()));
}
SB_KERNEL(THREADS) race_write(Buffers p) {
    copy(p);
    store_shared(reinterpret_cast<uint16_t*>(shared_memory()) + thread_index() / 2, uint16_t{0});
}
SB_KERNEL(THREADS) race_write_after_read(Buffers p) {
    copy(p);
    store_shared(stage(0) + thread_index(), Words4{});
    sync_block();
    if (thread_index() < 32) {
        load_shared(stage(0) + neighbour());
    } else {
        store_shared(stage(0) + thread_index(), Words4{});
    }
}
SB_KERNEL(THREADS) shared_read_outside(Buffers p) {
    copy(p);
    load_shared(stage(0) + STAGES * THREADS);
}
SB_KERNEL(THREADS) shared_write_outside(Buffers p) {
    copy(p);
    store_shared(shared_memory() - 1, uint8_t{0});
}
SB_KERNEL(THREADS) shared_misaligned(Buffers p) {
    copy(p);
    store_shared(reinterpret_cast<Words4*>(shared_memory() + 8) + 2 * thread_index(), Words4{});
}
SB_KERNEL(THREADS) global_read_outside(Buffers p) {
    copy(p);
    load_global(p.x + WORDS);
}
SB_KERNEL(THREADS) global_write_outside(Buffers p) {
    copy(p);
    store_global(p.y - 1, Words4{});
}
SB_KERNEL(THREADS) global_misaligned(Buffers p) {
    copy(p);
    load_weight(reinterpret_cast<const Words4*>(reinterpret_cast<const uint8_t*>(p.x) + 8));
}
SB_KERNEL(THREADS) global_uninitialized(Buffers p) {
    copy(p);
    load_global(p.scratch);
}
SB_KERNEL(THREADS) write_input(Buffers p) {
    copy(p);
    store_global(const_cast<Words4*>(p.x) + thread_index(), Words4{});
}
SB_KERNEL(THREADS) race_global(Buffers p) {
    copy(p);
    store_global(p.scratch, Words4{});
}
SB_KERNEL(THREADS) race_global_read(Buffers p) {
    copy(p);
    store_global(p.scratch + at(0) + thread_index(), Words4{});
    load_from_l2(p.scratch + at(0) + neighbour());
}
SB_KERNEL(THREADS) unwritten_output(Buffers p) {
    if (thread_index() != 7) return copy(p);
}
SB_KERNEL(THREADS) output_written_twice(Buffers p) {
    copy(p);
    if (block_x() == 1) store_global(p.y + thread_index(), Words4{});
}
SB_KERNEL(THREADS) loads_own_output(Buffers p) {
    copy(p);
    load_global(p.y + at(0) + thread_index());
}
// Where the blocks run the other way round, it is the load that comes second.
SB_KERNEL(THREADS) loads_before_another_writes(Buffers p) {
    copy(p);
    if (block_x() == 0) load_global(p.counters + 1);
    if (block_x() == 1 && thread_index() == 0) store_global(p.counters + 1, 1u);
}

void load_some_matrices(int row) {
    uint32_t fragment[4];
    load_matrices(fragment, stage(0) + row);
}
void fill_stage() {
    store_shared(stage(0) + thread_index(), Words4{});
    sync_block();
}
SB_KERNEL(THREADS) divergent_collective(Buffers p) {
    copy(p);
    fill_stage();
    float d[4] = {};
    if (thread_index() == 40) {
        multiply_dense<Half>(d, Words4{}, 0, 0);
    } else {
        load_some_matrices(0);
    }
}
SB_KERNEL(THREADS) collective_without_all(Buffers p) {
    copy(p);
    fill_stage();
    if (thread_index() != 3) load_some_matrices(0);
}
SB_KERNEL(THREADS) collective_against_barrier(Buffers p) {
    copy(p);
    fill_stage();
    if (thread_index() < 16) load_some_matrices(0);
    sync_block();
}
SB_KERNEL(THREADS) barrier_without_all(Buffers p) {
    copy(p);
    if (thread_index() < 32) sync_block();
}
SB_KERNEL(THREADS) matrices_misaligned(Buffers p) {
    copy(p);
    fill_stage();
    uint32_t fragment[4];
    load_matrices(fragment, shared_memory() + 8);
}
SB_KERNEL(THREADS) matrices_race(Buffers p) {
    copy(p);
    store_shared(stage(0) + thread_index(), Words4{});
    load_some_matrices(thread_index() ^ 1);
}
template <uint32_t METADATA>
SB_KERNEL(THREADS) metadata(Buffers p) {
    copy(p);
    float d[4] = {};
    const uint32_t b[4] = {};
    // Only the lanes of selector 1 are read.
    multiply_sparse<Half, 1>(d, Words4{}, b, thread_index() % 4 < 2 ? 0 : METADATA);
}
SB_KERNEL(THREADS) throws(Buffers) { throw std::runtime_error("this kernel throws"); }

// Products of one warp.

struct Fragments {
    const Words4* a;
    const uint32_t* b;
    const uint32_t* metadata;
    void* d;
};

template <typename T, int SELECTOR>
SB_KERNEL(32) sparse_product(Fragments p, int times) {
    const int lane = thread_index();
    uint32_t b[4];
    float d[4];
    for (int i = 0; i < 4; ++i) {
        b[i] = load_global(p.b + 4 * lane + i);
        d[i] = load_global(static_cast<const float*>(p.d) + 4 * lane + i);
    }
    const Words4 a = load_global(p.a + lane);
    const uint32_t metadata = load_global(p.metadata + lane);
    for (int i = 0; i < times; ++i) multiply_sparse<T, SELECTOR>(d, a, b, metadata);
    for (int i = 0; i < 4; ++i) store_global(static_cast<float*>(p.d) + 4 * lane + i, d[i]);
}

SB_KERNEL(32) sparse_product_int8(Fragments p, int times) {
    const int lane = thread_index();
    uint32_t b[4];
    int32_t d[4];
    for (int i = 0; i < 4; ++i) {
        b[i] = load_global(p.b + 4 * lane + i);
        d[i] = load_global(static_cast<const int32_t*>(p.d) + 4 * lane + i);
    }
    const Words4 a = load_global(p.a + lane);
    const uint32_t metadata = load_global(p.metadata + lane);
    for (int i = 0; i < times; ++i) multiply_sparse(d, a, b, metadata);
    for (int i = 0; i < 4; ++i) store_global(static_cast<int32_t*>(p.d) + 4 * lane + i, d[i]);
}

template <typename T>
SB_KERNEL(32) dense_product(Fragments p, int times) {
    const int lane = thread_index();
    const uint32_t b0 = load_global(p.b + 2 * lane), b1 = load_global(p.b + 2 * lane + 1);
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = load_global(static_cast<const float*>(p.d) + 4 * lane + i);
    const Words4 a = load_global(p.a + lane);
    for (int i = 0; i < times; ++i) multiply_dense<T>(d, a, b0, b1);
    for (int i = 0; i < 4; ++i) store_global(static_cast<float*>(p.d) + 4 * lane + i, d[i]);
}

// Lane i names row i, where row i of the matrices lies at 31 - i.
SB_KERNEL(32) matrices(Fragments p, int times) {
    const int lane = thread_index();
    auto* const rows = reinterpret_cast<Words4*>(shared_memory());
    store_shared(rows + 31 - lane, load_global(p.a + lane));
    sync_block();
    uint32_t fragment[4];
    for (int i = 0; i < times; ++i) load_matrices(fragment, rows + 31 - lane);
    for (int i = 0; i < 4; ++i) store_global(static_cast<uint32_t*>(p.d) + 4 * lane + i, fragment[i]);
}

// Each lane's words come from the lane whose number differs in these bits.
SB_KERNEL(32) shuffled(Fragments p, int bits) {
    const int lane = thread_index();
    const Words4 own = load_global(p.a + lane);
    for (int i = 0; i < 4; ++i) {
        store_global(static_cast<uint32_t*>(p.d) + 4 * lane + i, shuffle_xor(own.word[i], bits));
    }
}

// Each thread of a grid writes where it is, in the order in which the blocks begin.
void note_place(int32_t* place, uint32_t* counter, int threads) {
    const int t = thread_index();
    auto* const turn = reinterpret_cast<uint32_t*>(shared_memory());
    if (t == 0) store_shared(turn, atomic_add(counter, 1));
    sync_block();
    int32_t* const to = place + 3 * (load_shared(turn) * threads + t);
    store_global(to, block_x());
    store_global(to + 1, block_y());
    store_global(to + 2, t);
}

using Kernel = void (*)(Buffers);
const std::vector<std::pair<const char*, Kernel>> CASES = {
#define CASE(name) {#name, name}
    CASE(copy), CASE(copy_bytes), CASE(pipelined_copy), CASE(missing_wait), CASE(weak_wait),
    CASE(missing_sync_after_wait), CASE(missing_sync_before_copy), CASE(pending_copies), CASE(uncommitted_copies),
    CASE(copy_to_misaligned), CASE(copy_from_misaligned), CASE(copy_from_outside), CASE(copy_too_much),
    CASE(partial_copy<4>), CASE(partial_copy<8>), CASE(partial_copy<16>), CASE(reduction),
    CASE(split_with_one_fence), CASE(uninitialized_shared), CASE(shared_of_another_block), CASE(race_read),
    CASE(race_write), CASE(race_write_after_read), CASE(shared_read_outside), CASE(shared_write_outside),
    CASE(shared_misaligned), CASE(global_read_outside), CASE(global_write_outside), CASE(global_misaligned),
    CASE(global_uninitialized), CASE(write_input), CASE(race_global), CASE(race_global_read), CASE(unwritten_output),
    CASE(output_written_twice), CASE(loads_own_output), CASE(loads_before_another_writes),
    CASE(divergent_collective), CASE(collective_without_all), CASE(collective_against_barrier),
    CASE(barrier_without_all), CASE(matrices_misaligned), CASE(matrices_race),
    CASE(throws),
#undef CASE
    {"split", split<true, false, true>},
    {"split_without_fence", split<false, false, true>},
    {"split_with_late_fence", split<false, true, true>},
    {"split_not_coherent", split<true, false, false>},
    {"legal_nibbles", metadata<0x4e9d8c4e>},
    {"illegal_nibble", metadata<0x44644444>},
    {"zero_nibble", metadata<0x44444440>},
};

using Product = void (*)(Fragments, int);
const std::vector<std::pair<const char*, Product>> PRODUCTS = {
    {"sparse_float16_0", sparse_product<Half, 0>},      {"sparse_float16_1", sparse_product<Half, 1>},
    {"sparse_bfloat16_0", sparse_product<BFloat16, 0>}, {"sparse_bfloat16_1", sparse_product<BFloat16, 1>},
    {"sparse_int8", sparse_product_int8},               {"dense_float16", dense_product<Half>},
    {"dense_bfloat16", dense_product<BFloat16>},        {"matrices", matrices},
    {"shuffled", shuffled},
};

template <typename Function>
Function find(const std::vector<std::pair<const char*, Function>>& cases, const std::string& name) {
    for (const auto& [known, function] : cases) {
        if (name == known) return function;
    }
    throw std::invalid_argument("no case is named " + name);
}

simt::Order order_of(int seed) { return seed < 0 ? simt::Reversed : seed > 0 ? simt::shuffled(seed) : simt::Forward; }

// The first byte of y that is not written, or -1.
ptrdiff_t run(const std::string& name, uintptr_t x, uintptr_t y, uintptr_t scratch, uintptr_t counters, int seed) {
    const Buffers buffers{reinterpret_cast<const Words4*>(x), reinterpret_cast<Words4*>(y),
                          reinterpret_cast<Words4*>(scratch), reinterpret_cast<uint32_t*>(counters)};
    simt::Machine machine;
    machine.buffer("x", buffers.x, WORDS * sizeof(Words4), simt::Input);
    machine.buffer("y", buffers.y, WORDS * sizeof(Words4), simt::Output);
    machine.buffer("scratch", buffers.scratch, WORDS * sizeof(Words4), simt::Scratch);
    machine.buffer("counters", buffers.counters, 2 * sizeof(uint32_t), simt::InOut);
    const Kernel kernel = find(CASES, name);
    machine.launch({BLOCKS}, THREADS, SHARED, [&] { kernel(buffers); }, order_of(seed));
    return machine.first_unwritten("y");
}

void product(const std::string& name, uintptr_t a, uintptr_t b, uintptr_t metadata, uintptr_t d, int times) {
    const Fragments fragments{reinterpret_cast<const Words4*>(a), reinterpret_cast<const uint32_t*>(b),
                              reinterpret_cast<const uint32_t*>(metadata), reinterpret_cast<void*>(d)};
    simt::Machine machine;
    machine.buffer("a", fragments.a, 32 * 16, simt::Input);
    machine.buffer("b", fragments.b, 32 * 16, simt::Input);
    machine.buffer("metadata", fragments.metadata, 32 * 4, simt::Input);
    machine.buffer("d", fragments.d, 32 * 16, simt::InOut);
    const Product kernel = find(PRODUCTS, name);
    machine.launch({1}, 32, 32 * 16, [&] { kernel(fragments, times); });
}

void places(uintptr_t out, int grid_x, int grid_y, int threads, int shared_bytes, int seed) {
    auto* const place = reinterpret_cast<int32_t*>(out);
    uint32_t counter = 0;
    simt::Machine machine;
    machine.buffer("place", place, static_cast<size_t>(grid_x * grid_y * threads) * 12, simt::Output);
    machine.buffer("counter", &counter, sizeof(counter), simt::InOut);
    machine.launch({grid_x, grid_y}, threads, shared_bytes, [&] { note_place(place, &counter, threads); },
                   order_of(seed));
}

// n floats to 16 bits and back.
template <typename T>
void round_trip(uintptr_t x, uintptr_t bits, uintptr_t back, int n) {
    for (int i = 0; i < n; ++i) {
        const T value = from_float<T>(reinterpret_cast<const float*>(x)[i]);
        reinterpret_cast<T*>(bits)[i] = value;
        reinterpret_cast<float*>(back)[i] = to_float(value);
    }
}

}  // namespace
}  // namespace sparsebert

PYBIND11_MODULE(harness_cases, m) {
    m.def("run", sparsebert::run);
    m.def("product", sparsebert::product);
    m.def("places", sparsebert::places);
    m.def("round_trip_float16", sparsebert::round_trip<sparsebert::Half>);
    m.def("round_trip_bfloat16", sparsebert::round_trip<sparsebert::BFloat16>);
}
