// Kernels on Hopper's instructions, for the tests of the machine that runs them: right ones, and one for each mistake.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "hopper_kernels.cuh"
#include "simt.hpp"

namespace sparsebert::hopper {
namespace {

// Row-major, of 16 bits.
TensorMap map_of(uintptr_t address, int64_t rows, int64_t columns, int64_t row_bytes, int box_columns, int box_rows,
                 int swizzle) {
    return {reinterpret_cast<uint8_t*>(address), 2, {columns, rows}, row_bytes, {box_columns, box_rows},
            swizzle ? static_cast<simt::Swizzle>(swizzle) : simt::Swizzle::none};
}

using Copy = void (*)(TensorMap, TensorMap, int);
const std::vector<std::pair<const char*, Copy>> COPIES = {
#define COPY(mistake) {#mistake, tile_copy<Mistake::mistake>}
    COPY(none), COPY(no_init_fence), COPY(no_sync_after_init), COPY(no_wait_for_tile), COPY(wrong_parity),
    COPY(no_wait_for_readers), COPY(arrival_of_each_lane), COPY(arrival_missing), COPY(arrival_before_reading),
    COPY(arrival_without_sync_warp), COPY(more_bytes_expected), COPY(less_bytes_expected), COPY(no_bytes_expected),
    COPY(tile_of_nobody), COPY(no_proxy_fence), COPY(proxy_fence_by_reader), COPY(no_sync_before_store),
    COPY(no_wait_for_store), COPY(store_not_waited_for), COPY(store_not_committed), COPY(named_barrier_too_wide),
    COPY(named_barriers_differ), COPY(named_barrier_too_narrow),
#undef COPY
};

// With x, a matrix of 32 rows of 64 elements of 16 bits, in boxes of 16 rows with a 128-byte swizzle.
using Case = void (*)(TensorMap x);
uint8_t* shared(int at) { return aligned_shared_memory() + at; }
Barrier* barrier_at(int at) { return reinterpret_cast<Barrier*>(shared(at)); }
constexpr int BARRIER = 4096, BOX = 2048;

Barrier* ready_barrier(int count = 1) {
    if (thread_index() == 0) {
        init_barrier(barrier_at(BARRIER), count);
        fence_barrier_init();
    }
    sync_block();
    return barrier_at(BARRIER);
}
void load_one(const TensorMap& map, int at, int bytes) {
    Barrier* const barrier = ready_barrier();
    if (thread_index() == 0) {
        arrive_expect(barrier, bytes);
        load_tile(shared(at), map, 0, 0, barrier);
    }
    wait_barrier(barrier, 0);
}
void load_flat(const TensorMap& x, int at, int from, int bytes) {
    Barrier* const barrier = ready_barrier();
    if (thread_index() == 0) {
        arrive_expect(barrier, bytes);
        load_bytes(shared(at), x.base + from, bytes, barrier);
    }
    wait_barrier(barrier, 0);
}
template <typename Change>
void load_changed(TensorMap map, Change change) {
    change(map);
    load_one(map, 0, map.box_bytes());
}

const std::vector<std::pair<const char*, Case>> CASES = {
    {"loads", [](TensorMap x) { load_one(x, 1024, BOX); }},
    {"loads_plain",
     [](TensorMap x) { load_changed(x, [](TensorMap& map) { map.swizzle = simt::Swizzle::none; }); }},
    {"loads_bytes", [](TensorMap x) { load_flat(x, 16, 32, 48); }},
    {"tile_misaligned",
     [](TensorMap x) {
         x.swizzle = simt::Swizzle::none;
         load_one(x, 64, BOX);
     }},
    {"swizzled_tile_misaligned", [](TensorMap x) { load_one(x, 512, BOX); }},
    {"tile_outside_of_shared", [](TensorMap x) { load_one(x, BARRIER + 1024, BOX); }},
    {"tile_over_a_barrier", [](TensorMap x) {
         init_barrier(barrier_at(2048 + 8 * thread_index()), 1);
         load_one(x, 2048, BOX);
     }},
    {"box_too_large", [](TensorMap x) { load_changed(x, [](TensorMap& map) { map.box[1] = 257; }); }},
    {"box_wider_than_swizzle", [](TensorMap x) { load_changed(x, [](TensorMap& map) { map.box[0] = 128; }); }},
    {"stride_misaligned", [](TensorMap x) { load_changed(x, [](TensorMap& map) { map.row_bytes += 8; }); }},
    {"base_misaligned", [](TensorMap x) { load_changed(x, [](TensorMap& map) { map.base += 8; }); }},
    {"map_outside_of_matrix", [](TensorMap x) { load_changed(x, [](TensorMap& map) { map.base += 64 * 128; }); }},
    {"bytes_odd", [](TensorMap x) { load_flat(x, 0, 0, 24); }},
    {"bytes_to_misaligned", [](TensorMap x) { load_flat(x, 8, 0, 32); }},
    {"bytes_from_misaligned", [](TensorMap x) { load_flat(x, 0, 8, 32); }},
    {"barrier_misaligned", [](TensorMap) { init_barrier(barrier_at(4 + 8 * thread_index()), 1); }},
    {"barrier_twice",
     [](TensorMap) {
         Barrier* const barrier = ready_barrier();
         if (thread_index() == 0) init_barrier(barrier, 1);
     }},
    {"barriers_overlap",
     [](TensorMap) {
         ready_barrier();
         if (thread_index() == 0) init_barrier(barrier_at(BARRIER - 4), 1);
     }},
    {"barrier_of_nobody", [](TensorMap) { ready_barrier(0); }},
    {"no_barrier", [](TensorMap) { arrive(barrier_at(0)); }},
    {"barrier_overwritten",
     [](TensorMap) {
         Barrier* const barrier = ready_barrier();
         if (thread_index() == 0) store_shared(&barrier->state, uint64_t{0});
     }},
    {"too_many_bytes",
     [](TensorMap) {
         Barrier* const barrier = ready_barrier(2);
         if (thread_index() == 0) arrive_expect(barrier, 1 << 20);
     }},
    {"strange_parity", [](TensorMap) { wait_barrier(ready_barrier(), 2); }},
    {"never_ends", [](TensorMap) { wait_barrier(ready_barrier(), thread_index() < 16); }},
    {"arrivals_complete_a_phase",
     [](TensorMap) {
         Barrier* const barrier = ready_barrier(64);
         auto* const words = reinterpret_cast<Words4*>(shared(0));
         store_shared(words + thread_index(), Words4{});
         arrive(barrier);
         wait_barrier(barrier, 0);
         load_shared(words + 63 - thread_index());
     }},
    {"arrival_too_early",
     [](TensorMap) {
         Barrier* const barrier = ready_barrier(64);
         auto* const words = reinterpret_cast<Words4*>(shared(0));
         arrive(barrier);
         store_shared(words + thread_index(), Words4{});
         wait_barrier(barrier, 0);
         load_shared(words + 63 - thread_index());
     }},
    // Two phases later, and nobody has said that the reads are over.
    {"overwritten_by_the_next",
     [](TensorMap x) {
         load_one(x, 0, BOX);
         load_shared(reinterpret_cast<Words4*>(shared(0)) + thread_index());
         sync_warp();
         if (thread_index() == 0) {
             arrive_expect(barrier_at(BARRIER), BOX);
             load_tile(shared(0), x, 0, 16, barrier_at(BARRIER));
         }
         wait_barrier(barrier_at(BARRIER), 1);
     }},
    {"unfenced_below_a_tile",
     [](TensorMap x) {
         store_shared(shared(0) + thread_index(), uint8_t{0});
         load_one(x, 0, BOX);
     }},
    {"fenced_below_a_tile",
     [](TensorMap x) {
         store_shared(shared(0) + thread_index(), uint8_t{0});
         fence_async_proxy();
         load_one(x, 0, BOX);
     }},
    {"store_to_input",
     [](TensorMap x) {
         load_one(x, 0, BOX);
         if (thread_index()) return;
         store_tile(x, 0, 0, shared(0));
         commit_stores();
         wait_stores<0>();
     }},
    {"named_zero", [](TensorMap) { sync_named(0, 64); }},
    {"lanes_apart_at_a_barrier",
     [](TensorMap) {
         Barrier* const barrier = ready_barrier(32);
         if (thread_index() % 2 == 0) wait_barrier(barrier, 0);
         if (thread_index() % 2) arrive(barrier);
         sync_warp();
     }},
};

template <typename Function>
Function find(const std::vector<std::pair<const char*, Function>>& cases, const std::string& name) {
    for (const auto& [known, function] : cases) {
        if (name == known) return function;
    }
    throw std::invalid_argument("no case is named " + name);
}

// Bytes from the first element to the last one.
size_t size_of(int64_t rows, int64_t columns, int64_t row_bytes) { return (rows - 1) * row_bytes + columns * 2; }

void run_copy(const std::string& name, uintptr_t x, uintptr_t y, int rows, int columns, int64_t row_bytes) {
    simt::Machine machine;
    machine.buffer("x", reinterpret_cast<void*>(x), size_of(rows, columns, row_bytes), simt::Input);
    machine.buffer("y", reinterpret_cast<void*>(y), size_of(rows, columns, row_bytes), simt::Output);
    const Copy kernel = find(COPIES, name);
    const auto map = [&](uintptr_t address) {
        return map_of(address, rows, columns, row_bytes, Tiles::COLUMNS, Tiles::ROWS, 128);
    };
    const int across = (columns + Tiles::COLUMNS - 1) / Tiles::COLUMNS;
    const int down = (rows + Tiles::ROWS - 1) / Tiles::ROWS;
    machine.launch({across}, Tiles::THREADS, Tiles::SHARED, [&] { kernel(map(x), map(y), down); });
}

void run_case(const std::string& name, uintptr_t x) {
    simt::Machine machine;
    machine.buffer("x", reinterpret_cast<void*>(x), 32 * 128, simt::Input);
    const Case kernel = find(CASES, name);
    machine.launch({2}, 64, BARRIER + 16, [&] { kernel(map_of(x, 32, 64, 128, 64, 16, 128)); });
}

void run_dump(uintptr_t x, uintptr_t to, int rows, int columns, int64_t row_bytes, int box_columns, int box_rows,
              int swizzle, int inner, int outer) {
    const TensorMap map = map_of(x, rows, columns, row_bytes, box_columns, box_rows, swizzle);
    const int bytes = map.box_bytes();
    simt::Machine machine;
    machine.buffer("x", reinterpret_cast<void*>(x), size_of(rows, columns, row_bytes), simt::Input);
    machine.buffer("to", reinterpret_cast<void*>(to), bytes, simt::Output);
    machine.launch({1}, 32, bytes + 16, [&] { dump_tile(map, reinterpret_cast<Words4*>(to), bytes, inner, outer); });
}

void run_packed(uintptr_t x, uintptr_t y, int bytes) {
    simt::Machine machine;
    machine.buffer("x", reinterpret_cast<void*>(x), bytes, simt::Input);
    machine.buffer("y", reinterpret_cast<void*>(y), bytes, simt::Output);
    machine.launch({1}, 128, bytes + 16, [&] {
        packed_copy(reinterpret_cast<const Words4*>(x), reinterpret_cast<Words4*>(y), bytes);
    });
}

void run_transposed(uintptr_t x, uintptr_t y) {
    simt::Machine machine;
    machine.buffer("x", reinterpret_cast<void*>(x), 512, simt::Input);
    machine.buffer("y", reinterpret_cast<void*>(y), 512, simt::Output);
    machine.launch({1}, 32, 512, [&] { transposed(reinterpret_cast<const Words4*>(x), reinterpret_cast<Words4*>(y)); });
}

// Products

// Elements of A and B by rows along k, A's kept ones only; fragments and metadata by stage, step and lane.
struct ProductCall {
    uintptr_t a, b, fragments, metadata, sums;
    int stages;
    bool add;
};
using Multiply = void (*)(const ProductCall&);

template <typename Kernel, typename T, int N>
void run_product(const ProductCall& call) {
    const int64_t a_row = int64_t{call.stages} * Kernel::A_ROW, b_row = int64_t{call.stages} * Kernel::B_ROW;
    const int lanes = call.stages * Kernel::STEPS * 128;
    simt::Machine machine;
    machine.buffer("a", reinterpret_cast<void*>(call.a), 64 * a_row, simt::Input);
    machine.buffer("b", reinterpret_cast<void*>(call.b), N * b_row, simt::Input);
    machine.buffer("fragments", reinterpret_cast<void*>(call.fragments), lanes * 16, simt::Input);
    machine.buffer("metadata", reinterpret_cast<void*>(call.metadata), lanes * 4, simt::Input);
    machine.buffer("sums", reinterpret_cast<void*>(call.sums), N * 64 * 4, simt::InOut);
    const auto map = [](uintptr_t address, int64_t rows, int64_t row_bytes, int box_bytes) {
        constexpr int SIZE = sizeof(T);
        const int width = box_bytes / SIZE;
        return TensorMap{reinterpret_cast<uint8_t*>(address), SIZE, {row_bytes / SIZE, rows}, row_bytes,
                         {width, static_cast<int>(rows)}, static_cast<simt::Swizzle>(box_bytes)};
    };
    const TensorMap a = map(call.a, 64, a_row, Kernel::A_ROW), b = map(call.b, N, b_row, Kernel::B_ROW);
    const typename Kernel::Parameters p{reinterpret_cast<const Words4*>(call.fragments),
                                        reinterpret_cast<const uint32_t*>(call.metadata),
                                        reinterpret_cast<SumOf<T>*>(call.sums), call.stages, call.add};
    machine.launch({1}, Kernel::THREADS, Kernel::SHARED, [&] { products<Kernel>(a, b, p); });
}

template <typename T, int N, bool SPARSE, bool FRAGMENTS, int SELECTOR = 0, Slip SLIP = Slip::none>
constexpr Multiply product = run_product<Products<T, N, SPARSE, FRAGMENTS, SELECTOR, SLIP>, T, N>;

const std::vector<std::pair<const char*, Multiply>> MULTIPLIES = {
#define FORMS(type, n)                                                                                        \
    {#type "_" #n "_dense_shared_0", product<type, n, false, false>},                                         \
        {#type "_" #n "_dense_fragments_0", product<type, n, false, true>},                                   \
        {#type "_" #n "_sparse_shared_0", product<type, n, true, false>},                                     \
        {#type "_" #n "_sparse_fragments_0", product<type, n, true, true>}
    FORMS(Half, 8), FORMS(Half, 64), FORMS(Half, 256), FORMS(BFloat16, 128), FORMS(int8_t, 16), FORMS(int8_t, 32),
    FORMS(int8_t, 128),
#undef FORMS
    {"Half_64_sparse_shared_1", product<Half, 64, true, false, 1>},
    {"BFloat16_64_sparse_fragments_1", product<BFloat16, 64, true, true, 1>},
#define SLIPS(slip, sparse, fragments) {#slip, product<Half, 16, sparse, fragments, 0, Slip::slip>}
    SLIPS(no_start, false, false), SLIPS(sums_read_early, false, true), SLIPS(sums_written_early, true, false),
    SLIPS(sums_written_after_start, false, true), SLIPS(fragments_written_early, true, true),
    SLIPS(stage_released_early, false, false), SLIPS(tile_waited_for_by_three_warps, true, false),
    SLIPS(three_warps, false, false), SLIPS(descriptors_differ, false, false),
    SLIPS(descriptor_across_rows, true, false), SLIPS(descriptor_between_rows, false, false),
    SLIPS(stride_odd, false, true), SLIPS(not_committed, false, true), SLIPS(not_waited_for, false, false),
    SLIPS(rewritten, false, false), SLIPS(rewritten_without_fence, false, false),
    SLIPS(rewritten_without_barrier, false, false),
#undef SLIPS
};

void run_multiply(const std::string& name, uintptr_t a, uintptr_t b, uintptr_t fragments, uintptr_t metadata,
                  uintptr_t sums, int stages, bool add) {
    find(MULTIPLIES, name)({a, b, fragments, metadata, sums, stages, add});
}

void run_plain_product(uintptr_t a, uintptr_t b, uintptr_t sums) {
    simt::Machine machine;
    machine.buffer("a", reinterpret_cast<void*>(a), 64 * 32, simt::Input);
    machine.buffer("b", reinterpret_cast<void*>(b), 8 * 32, simt::Input);
    machine.buffer("sums", reinterpret_cast<void*>(sums), 8 * 64 * 4, simt::Output);
    machine.launch({1}, 128, 128 * 16 + 256, [&] {
        plain_product(reinterpret_cast<const Words4*>(a), reinterpret_cast<const Words4*>(b),
                      reinterpret_cast<float*>(sums));
    });
}

// Clusters

using Exchange = void (*)(const uint32_t*, uint32_t*);
const std::vector<std::pair<const char*, Exchange>> EXCHANGES = {
#define EXCHANGE(fault) {#fault, exchange<Fault::fault>}
    EXCHANGE(none), EXCHANGE(no_first_barrier), EXCHANGE(no_middle_barrier), EXCHANGE(no_last_barrier),
    EXCHANGE(no_wait), EXCHANGE(rank_outside),
#undef EXCHANGE
    {"handover", handover<Fault::none>},
    {"wait_for_block_only", handover<Fault::wait_for_block_only>},
    {"only_released", handover<Fault::only_released>},
    {"no_init_fence", handover<Fault::no_init_fence>},
};
const std::vector<std::pair<const char*, void (*)(TensorMap, Words4*, int)>> MULTICASTS = {
#define MULTICAST(fault) {#fault, multicast<Fault::fault>}
    MULTICAST(none), MULTICAST(tile_of_one_block), MULTICAST(no_remote_release), MULTICAST(no_wait_for_readers),
    MULTICAST(no_last_barrier),
#undef MULTICAST
};

void run_exchange(const std::string& name, uintptr_t x, uintptr_t y, int clusters, int blocks) {
    const int words = clusters * blocks * 64;
    simt::Machine machine;
    machine.buffer("x", reinterpret_cast<void*>(x), words * 4, simt::Input);
    machine.buffer("y", reinterpret_cast<void*>(y), words * 8, simt::Scratch);
    const auto kernel = find(EXCHANGES, name);
    machine.launch({clusters * blocks}, 64, 256 + 8, [&] {
        kernel(reinterpret_cast<const uint32_t*>(x), reinterpret_cast<uint32_t*>(y));
    }, simt::Forward, blocks);
}

void run_multicast(const std::string& name, uintptr_t x, uintptr_t y, int tiles) {
    const int rows = tiles * Multicast::BLOCKS * Multicast::ROWS;
    simt::Machine machine;
    machine.buffer("x", reinterpret_cast<void*>(x), rows * 128, simt::Input);
    machine.buffer("y", reinterpret_cast<void*>(y), Multicast::BLOCKS * rows * 128, simt::Output);
    const auto kernel = find(MULTICASTS, name);
    const TensorMap map = map_of(x, rows, 64, 128, 64, Multicast::ROWS, 128);
    machine.launch({Multicast::BLOCKS}, Multicast::THREADS, Multicast::SHARED,
                   [&] { kernel(map, reinterpret_cast<Words4*>(y), tiles); }, simt::Forward, Multicast::BLOCKS);
}

}  // namespace
}  // namespace sparsebert::hopper

PYBIND11_MODULE(hopper_cases, m) {
    using namespace sparsebert::hopper;
    m.def("copy", run_copy);
    m.def("case", run_case);
    m.def("dump", run_dump);
    m.def("packed", run_packed);
    m.def("transposed", run_transposed);
    m.def("multiply", run_multiply);
    m.def("plain_product", run_plain_product);
    m.def("exchange", run_exchange);
    m.def("multicast", run_multicast);
}
