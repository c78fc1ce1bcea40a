// Runs CUDA kernels, as they are, on the CPU, and finds what they do wrong.
//
//     simt::Machine machine;
//     machine.buffer("x", x, bytes, simt::Input);
//     machine.buffer("y", y, bytes, simt::Output);
//     machine.launch({blocks_x, blocks_y}, threads, shared_bytes, [&] { sparsebert::some_kernel<...>(params); });
//     machine.written("y");
//
// A kernel includes <common/intrinsics.cuh>, which is the one beside this file, and everything that it does through
// that header is checked. A launch throws std::runtime_error with one line for each of the first mistakes, and stops
// after the block that made them.
//
// Threads are fibers and blocks run one after the other, so that every run is the same. What another order of the
// threads would do is told by the bytes that they touched between two barriers, and copies arrive as late as they may.
//
// Not seen: what is done with a bare pointer, registers that were never set, lanes that meet at the same operation on
// different lines, races between blocks (but for reads of what is not published), bank conflicts, and time. A kernel
// that waits for another block to write something waits for ever.
#pragma once

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "collectives.hpp"
#include "fiber.hpp"
#include "memory.hpp"
#include "report.hpp"

namespace simt {

struct Grid {
    int x;
    int y = 1;
};

// In which the blocks run.
struct Order {
    enum { FORWARD, REVERSED, SHUFFLED } kind;
    uint32_t seed;
};
inline constexpr Order Forward{Order::FORWARD, 0};
inline constexpr Order Reversed{Order::REVERSED, 0};
constexpr Order shuffled(uint32_t seed) { return {Order::SHUFFLED, seed}; }

inline constexpr Collective barrier{"sync_block", nullptr};
inline constexpr Collective exited{"exit", nullptr};

class Machine {
  public:
    Machine() = default;
    Machine(const Machine&) = delete;
    Machine& operator=(const Machine&) = delete;

    // Nothing else in global memory may be touched. What is not initialized is filled with NaN.
    void buffer(const std::string& name, const void* data, size_t bytes, Use use) {
        global.add(name, data, bytes, use);
    }

    // Has every byte been written?
    bool written(const std::string& name) const { return first_unwritten(name) < 0; }
    ptrdiff_t first_unwritten(const std::string& name) const { return global.first_unwritten(name); }

    void launch(Grid grid, int threads, size_t shared_bytes, const std::function<void()>& kernel,
                Order order = Forward) {
        constexpr size_t MOST_SHARED = 227 << 10;
        if (threads < 1 || threads > Stacks::COUNT || threads % 32 || shared_bytes > MOST_SHARED) {
            throw std::invalid_argument("no block has " + std::to_string(threads) + " threads and " +
                                        std::to_string(shared_bytes) + " bytes of shared memory");
        }
        kernel_ = &kernel;
        threads_.resize(threads);
        shared.resize(shared_bytes);
        global.begin_launch();
        now.launch = now.clock;
        running = this;
        for (const int block : blocks(grid, order)) {
            now.block_x = block % grid.x;
            now.block_y = block / grid.x;
            run_block();
            if (!report.empty()) break;
        }
        running = nullptr;
        report.raise();
    }

    // The rest is for the intrinsics, in the thread that runs.

    inline static Machine* running = nullptr;

    Now now;
    Report report{now};
    Shared shared{now, report};
    Global global{now, report};

    // Goes on when all lanes of the warp have met here; for the barrier, all threads of the block.
    void meet(const Collective& place, const void* arguments = nullptr) {
        Thread& thread = threads_[now.thread];
        thread.at = &place;
        thread.arguments = arguments;
        Fiber::change(thread.fiber, scheduler_);
    }

    void fence() {
        ++now.clock;
        global.fence();
    }
    void publish() {
        ++now.clock;
        global.publish();
    }

    // Copies happen as late as they may: at the first wait that their group does not survive.
    void copy(void* to, const void* from, size_t bytes, int valid) {
        static const char* const NAME = "copy_async";
        if (valid < 0 || static_cast<size_t>(valid) > bytes) {
            report.add("out of range", NAME, " of ", bytes, " bytes with ", valid, " of them valid");
            return;
        }
        if (reinterpret_cast<uintptr_t>(from) % bytes) {
            report.add("misaligned", NAME, " reads an address that must be at a multiple of ", bytes);
        }
        const Copy copy{static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), static_cast<int>(bytes), valid};
        // It may read at once, too.
        if (read_source(copy) && shared.begin_copy(NAME, to, bytes)) threads_[now.thread].copies.push_back(copy);
    }
    void commit() {
        Thread& thread = threads_[now.thread];
        thread.group_ends.push_back(thread.copies.size());
    }
    void wait(size_t pending) {
        Thread& thread = threads_[now.thread];
        if (thread.group_ends.size() <= pending) return;
        const size_t groups = thread.group_ends.size() - pending;
        const size_t copies = thread.group_ends[groups - 1];
        for (size_t i = 0; i < copies; ++i) {
            const Copy& copy = thread.copies[i];
            shared.end_copy(copy.to, copy.bytes);
            std::memset(copy.to, 0, copy.bytes);
            if (read_source(copy)) std::memcpy(copy.to, copy.from, copy.valid);
        }
        thread.copies.erase(thread.copies.begin(), thread.copies.begin() + copies);
        thread.group_ends.erase(thread.group_ends.begin(), thread.group_ends.begin() + groups);
        for (size_t& end : thread.group_ends) end -= copies;
    }

  private:
    struct Copy {
        uint8_t* to;
        const uint8_t* from;
        int bytes;
        int valid;
    };
    struct Thread {
        Fiber fiber;
        const Collective* at;  // waits there; null where it can go on
        const void* arguments;
        std::vector<Copy> copies;
        std::vector<size_t> group_ends;  // in copies
    };

    static std::vector<int> blocks(Grid grid, Order order) {
        std::vector<int> blocks(static_cast<size_t>(grid.x) * grid.y);
        std::iota(blocks.begin(), blocks.end(), 0);
        if (order.kind == Order::REVERSED) std::reverse(blocks.begin(), blocks.end());
        if (order.kind == Order::SHUFFLED) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(order.seed));
        return blocks;
    }

    // 16 bytes come past the L1, as those of load_from_l2 do.
    bool read_source(const Copy& copy) {
        return !copy.valid || global.read("copy_async", copy.from, copy.valid, 1,
                                          copy.bytes == 16 ? Global::Coherent : Global::Cached);
    }

    void run_block() {
        const int count = static_cast<int>(threads_.size());
        now.barriers = 0;
        now.block = now.interval = ++now.clock;
        shared.poison();
        global.begin_block(count);
        for (int i = 0; i < count; ++i) {
            Thread& thread = threads_[i];
            thread.fiber.start(Stacks::get().top(i), run_thread);
            thread.at = nullptr;
            thread.copies.clear();
            thread.group_ends.clear();
        }
        for (;;) {
            for (int warp = 0; warp < count; warp += 32) {
                if (!run_warp(warp)) return;
            }
            if (!all_at(*threads_[0].at, 0, count)) return report_apart("barrier", 0, count);
            if (threads_[0].at == &exited) return;
            for (Thread& thread : threads_) thread.at = nullptr;
            now.interval = ++now.clock;
            ++now.barriers;
        }
    }

    // Until all lanes are at the barrier or have exited, or the block cannot go on.
    bool run_warp(int first) {
        for (;;) {
            for (int i = first; i < first + 32; ++i) {
                if (threads_[i].at) continue;
                now.thread = i;
                Fiber::change(scheduler_, threads_[i].fiber);
                if (report.hopeless()) return false;
            }
            const auto meets = [](const Thread& thread) { return thread.at->run != nullptr; };
            if (std::none_of(&threads_[first], &threads_[first] + 32, meets)) return true;
            const Collective& place = *threads_[first].at;
            if (!all_at(place, first, 32)) {
                report_apart("divergence", first, 32);
                return false;
            }
            Lanes lanes{now, report, shared, first, {}};
            for (int lane = 0; lane < 32; ++lane) lanes.arguments[lane] = threads_[first + lane].arguments;
            place.run(lanes);
            for (int lane = 0; lane < 32; ++lane) threads_[first + lane].at = nullptr;
        }
    }

    bool all_at(const Collective& place, int first, int count) const {
        return std::all_of(&threads_[first], &threads_[first] + count,
                           [&](const Thread& thread) { return thread.at == &place; });
    }

    void report_apart(const char* kind, int first, int count) {
        const Collective* const place = threads_[first].at;
        const auto other = std::find_if(threads_.begin() + first, threads_.begin() + first + count,
                                        [&](const Thread& thread) { return thread.at != place; });
        report.add_for_block(kind, "thread ", first, " is at ", place->name, " and thread ", other - threads_.begin(),
                             " at ", other->at->name, ", ", now.since());
    }

    // The bottom of each fiber.
    static void run_thread() {
        Machine& machine = *running;
        try {
            (*machine.kernel_)();
        } catch (const std::exception& error) {
            machine.report.add("exception", error.what());
        }
        if (const size_t copies = machine.threads_[machine.now.thread].copies.size()) {
            machine.report.add("pending copies", "at exit, not waited for: ", copies);
        }
        machine.meet(exited);
        std::abort();  // nobody goes on here
    }

    const std::function<void()>* kernel_ = nullptr;
    std::vector<Thread> threads_;
    Fiber scheduler_;
};

}  // namespace simt
