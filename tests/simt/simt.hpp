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
// Threads are fibers and blocks run one after the other, those of a cluster together, so that every run is the same.
// What another order of the threads would do is told by what each knows of the others' accesses, from barriers of all
// kinds. Copies arrive as late as they may: those for an mbarrier once a thread waits for its phase and no other can
// run. What the async proxy reads has to be fenced by who wrote it. Where all threads wait, it is said what for.
//
// Not seen: what is done with a bare pointer, registers that were never set, lanes that meet at the same operation on
// different lines, races between blocks (but for reads of what is not published), bank conflicts, and time; nor a wait
// for a phase of an mbarrier that is two too early, since the hardware knows it by its parity, nor what the async proxy
// misses of global memory. A kernel that waits for a block of another cluster to write something waits for ever.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <vector>

#include "barriers.hpp"
#include "bulk.hpp"
#include "causality.hpp"
#include "collectives.hpp"
#include "fiber.hpp"
#include "memory.hpp"
#include "products.hpp"
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
inline constexpr Collective waiting{"wait_barrier", nullptr};
inline constexpr Collective named{"sync_named", nullptr};
inline constexpr Collective clustered{"wait_cluster", nullptr};

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

    // cluster: how many blocks, beside each other along x, run together.
    void launch(Grid grid, int threads, size_t shared_bytes, const std::function<void()>& kernel,
                Order order = Forward, int cluster = 1) {
        constexpr size_t MOST_SHARED = 227 << 10;
        constexpr int MOST_THREADS = 1024, MOST_BLOCKS = 8;
        if (threads < 1 || threads > MOST_THREADS || threads % 32 || shared_bytes > MOST_SHARED) {
            throw std::invalid_argument("no block has " + std::to_string(threads) + " threads and " +
                                        std::to_string(shared_bytes) + " bytes of shared memory");
        }
        if (cluster < 1 || cluster > MOST_BLOCKS || grid.x % cluster || cluster * threads > Stacks::COUNT) {
            throw std::invalid_argument("no grid of " + std::to_string(grid.x) +
                                        " blocks along x runs in clusters of " + std::to_string(cluster));
        }
        kernel_ = &kernel;
        threads_ = threads;
        blocks_.clear();
        for (int rank = 0; rank < cluster; ++rank) blocks_.push_back(std::make_unique<Block>(*this, threads));
        for (const auto& block : blocks_) block->shared.resize(shared_bytes);
        global.begin_launch();
        now.launch = now.clock;
        running = this;
        for (const int index : in_order(grid.x / cluster * grid.y, order)) {
            run_cluster(index % (grid.x / cluster) * cluster, index / (grid.x / cluster));
            if (!report.empty()) break;
        }
        running = nullptr;
        report.raise();
    }

    // The rest is for the intrinsics, in the thread that runs.

    inline static Machine* running = nullptr;

    Now now;
    Report report{now};
    Causality causality{now};
    Global global{now, causality, report};

    Shared& shared() { return block_->shared; }

    // Goes on when all lanes of the warp, or warpgroup, have met here; for the barrier, all threads of the block.
    void meet(const Collective& place, const void* arguments = nullptr) {
        Thread& thread = this_thread();
        thread.at = &place;
        thread.arguments = arguments;
        Fiber::change(thread.fiber, scheduler_);
    }

    void meet_warpgroup(const Collective& place, const void* arguments = nullptr) {
        become_exact();
        if (now.thread / 128 >= threads_ / 128) {
            throw std::logic_error(std::string(place.name) + " in a block of " + std::to_string(threads_) +
                                   " threads, where this one has no whole warpgroup");
        }
        meet(place, arguments);
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
        if (read_source(copy) && shared().begin_copy(NAME, to, bytes)) this_thread().copies.add(copy);
    }
    void commit() { this_thread().copies.commit(); }
    void wait(size_t pending) {
        for (const Copy& copy : this_thread().copies.take(pending)) {
            shared().end_copy(copy.to, copy.bytes);
            std::memset(copy.to, 0, copy.bytes);
            if (read_source(copy)) std::memcpy(copy.to, copy.from, copy.valid);
        }
    }

    // Hopper's barriers, copies and fences

    void sync_warp() {
        become_exact();
        meet(simt::sync_warp);
    }

    void init_barrier(void* barrier, int count) {
        become_exact();
        block_->mbarriers.init(barrier, count);
    }
    void fence_barrier_init() { block_->mbarriers.fence_init(); }
    void arrive(const char* operation, void* barrier, int bytes) {
        if (Mbarrier* const found = block_->mbarriers.find(operation, barrier)) {
            block_->mbarriers.arrive(operation, *found, bytes);
        }
    }
    void wait_barrier(void* barrier, int parity) {
        if (const Mbarrier* const found = pass_phase(barrier, parity)) causality.acquire(found->finishing);
    }
    void wait_barrier_of_cluster(void* barrier, int parity) {
        const Mbarrier* const found = pass_phase(barrier, parity);
        if (!found) return;
        causality.acquire(found->finishing);
        causality.acquire(found->finishing_from_afar);
    }

    void sync_named(int id, int threads) {
        become_exact();
        if (id < 1 || id > 15 || threads < 32 || threads > threads_ || threads % 32) {
            report.add("named barrier", "sync_named ", id, " of ", threads,
                       " threads, expected 1 to 15 and whole warps of the block");
            return;
        }
        NamedBarrier& barrier = block_->named[id];
        if (barrier.arrived.empty()) barrier.expected = threads;
        if (barrier.expected != threads) {
            report.add("named barrier", "sync_named ", id, " of ", threads, " threads, where thread ",
                       barrier.arrived[0], " said ", barrier.expected);
        }
        barrier.arrived.push_back(now.thread);
        this_thread().named = id;
        meet(named);
    }

    void fence_async_proxy() {
        become_exact();
        causality.fence();
    }

    void load_tile(BulkCopy copy, void* barrier) {
        become_exact();
        Mbarrier* const found = block_->mbarriers.find(copy.name, barrier, true);
        if (!found || !may_start(copy)) return;
        copy.check_global(global);
        if (shared().begin_bulk(copy.name, copy.shared, copy.bytes(), 16)) {
            block_->mbarriers.start(*found, std::move(copy));
        }
    }
    // To the same places of other blocks: bit by bit of their ranks.
    void load_tile_to_blocks(const BulkCopy& copy, void* barrier, unsigned ranks) {
        become_exact();
        if (!ranks || ranks >> blocks_.size()) {
            report.add("out of range", copy.name, " to blocks ", ranks, " by their bits, in a cluster of ",
                       blocks_.size());
            return;
        }
        if (!may_start(copy)) return;
        copy.check_global(global);
        for (int rank = 0; rank < cluster_blocks(); ++rank) {
            Block* const block = ranks >> rank & 1 ? reach(copy.name, rank) : nullptr;
            if (!block) continue;
            BulkCopy there = copy;
            there.shared = block->shared.data() + shared().offset(copy.shared);
            Mbarrier* const found =
                block->mbarriers.find(copy.name, block->shared.data() + shared().offset(barrier), true);
            if (found && block->shared.begin_bulk(copy.name, there.shared, copy.bytes(), 16)) {
                block->mbarriers.start(*found, std::move(there));
            }
        }
    }
    void store_tile(const BulkCopy& copy) {
        become_exact();
        if (may_start(copy) && shared().begin_reading(copy.name, copy.shared, copy.bytes(), 16)) {
            this_thread().stores.add(copy);
        }
    }
    void commit_stores() { this_thread().stores.commit(); }
    void wait_stores(size_t pending) {
        for (const BulkCopy& copy : this_thread().stores.take(pending)) {
            copy.write_global(shared().data(), global);
            shared().end_reading(copy.shared, copy.bytes(), now.self());
        }
    }

    void check_map(const char* operation, const TensorMap& map) { fits(operation, map.fault()); }

    // Clusters

    int rank() const { return now.first / threads_; }
    int cluster_blocks() const { return static_cast<int>(blocks_.size()); }

    void arrive_cluster() {
        become_exact();
        Thread& thread = this_thread();
        if (thread.arrived) report.add("cluster", "arrive_cluster a second time without wait_cluster");
        thread.arrived = true;
        thread.cluster_phase = cluster_.phase;
        causality.release(cluster_.arriving);
        if (++cluster_.arrived < threads_ * cluster_blocks()) return;
        if (!cluster_.phase) {
            cluster_.agent = causality.add_agent("the cluster");
            cluster_.first_time = now.clock;
            cluster_.arriving.note_seen(cluster_.agent, ++now.clock);
        }
        cluster_.finishing = cluster_.arriving;
        cluster_.arrived = 0;
        ++cluster_.phase;
    }
    void wait_cluster() {
        Thread& thread = this_thread();
        if (!thread.arrived) {
            report.add("cluster", "wait_cluster without arrive_cluster");
            return;
        }
        if (cluster_.phase == thread.cluster_phase) meet(clustered);
        thread.arrived = false;
        causality.acquire(cluster_.finishing);
    }

    // An address as the kernel has it: the block in the upper byte.
    uint32_t remote_address(const void* pointer, int rank) {
        return static_cast<uint32_t>(rank) << RANK_SHIFT | static_cast<uint32_t>(shared().offset(pointer));
    }
    void load_remote(void* value, uint32_t address, size_t bytes) {
        Block* const block = reach("load_remote", address >> RANK_SHIFT);
        if (!block) return;
        const uint8_t* const from = block->shared.data() + (address & OFFSET);
        if (block->shared.read("load_remote", from, bytes, bytes)) std::memcpy(value, from, bytes);
    }
    void store_remote(uint32_t address, const void* value, size_t bytes) {
        Block* const block = reach("store_remote", address >> RANK_SHIFT);
        if (!block) return;
        uint8_t* const to = block->shared.data() + (address & OFFSET);
        if (block->shared.write("store_remote", to, bytes, bytes)) std::memcpy(to, value, bytes);
    }
    void arrive_remote(const char* operation, void* barrier, int rank, Arrival arrival) {
        become_exact();
        Block* const block = reach(operation, rank);
        if (!block) return;
        const bool same = block == block_;
        uint8_t* const there = block->shared.data() + shared().offset(barrier);
        Mbarrier* const found = block->mbarriers.find(operation, there, !same);
        const bool near = same && arrival == Arrival::afar;
        if (found) block->mbarriers.arrive(operation, *found, 0, near ? Arrival::near : arrival);
    }

  private:
    struct Copy {
        uint8_t* to;
        const uint8_t* from;
        int bytes;
        int valid;
    };
    // Copies of a thread, which it waits for group by group.
    template <typename T>
    class Groups {
      public:
        void clear() {
            copies_.clear();
            ends_.clear();
        }
        size_t size() const { return copies_.size(); }
        void add(const T& copy) { copies_.push_back(copy); }
        void commit() { ends_.push_back(copies_.size()); }
        // All but those of the last groups.
        std::vector<T> take(size_t pending) {
            if (ends_.size() <= pending) return {};
            const size_t groups = ends_.size() - pending, count = ends_[groups - 1];
            std::vector<T> taken(copies_.begin(), copies_.begin() + count);
            copies_.erase(copies_.begin(), copies_.begin() + count);
            ends_.erase(ends_.begin(), ends_.begin() + groups);
            for (size_t& end : ends_) end -= count;
            return taken;
        }

      private:
        std::vector<T> copies_;
        std::vector<size_t> ends_;
    };
    struct Thread {
        Fiber fiber;
        const Collective* at;  // waits there; null where it can go on
        const void* arguments;
        Groups<Copy> copies;
        Groups<BulkCopy> stores;
        // Where it waits for one.
        const Mbarrier* barrier;
        int parity;
        int named;
        bool arrived;       // at the cluster's barrier, and has not waited
        int cluster_phase;  // in which it arrived
    };
    struct Block {
        Block(Machine& machine, int count)
            : shared(machine.now, machine.causality, machine.report),
              mbarriers(machine.now, machine.causality, machine.report, shared),
              warpgroups(count / 128, Warpgroup(machine.now, machine.causality, machine.report, shared)),
              threads(count) {}

        int x = 0;
        int y = 0;
        int first = 0;  // thread, in the cluster
        // As in Now.
        int barriers = 0;
        uint32_t interval = 0;
        uint32_t block = 0;
        std::map<int, uint32_t> visits;  // when threads of other blocks last came to its shared memory
        Shared shared;
        Mbarriers mbarriers;
        std::array<NamedBarrier, 16> named;
        std::vector<Warpgroup> warpgroups;
        std::vector<Thread> threads;
    };

    static std::vector<int> in_order(int count, Order order) {
        std::vector<int> clusters(count);
        std::iota(clusters.begin(), clusters.end(), 0);
        if (order.kind == Order::REVERSED) std::reverse(clusters.begin(), clusters.end());
        if (order.kind == Order::SHUFFLED) std::shuffle(clusters.begin(), clusters.end(), std::mt19937(order.seed));
        return clusters;
    }

    static constexpr int RANK_SHIFT = 24;
    static constexpr uint32_t OFFSET = (1u << RANK_SHIFT) - 1;

    // Waits for the barrier's phase; null where there is no such thing.
    const Mbarrier* pass_phase(void* barrier, int parity) {
        Mbarrier* const found = block_->mbarriers.find("wait_barrier", barrier);
        if (!found) return nullptr;
        if (parity != 0 && parity != 1) {
            report.add("barrier", "wait_barrier for parity ", parity, ", expected 0 or 1");
            return nullptr;
        }
        if (!found->has_finished(parity)) {
            this_thread().barrier = found;
            this_thread().parity = parity;
            meet(waiting);
        }
        return found;
    }

    // A block of the cluster whose shared memory this thread comes to: it has to run by then, and still.
    Block* reach(const char* operation, int rank) {
        if (rank < 0 || rank >= cluster_blocks()) {
            report.add("out of range", operation, " at block ", rank, " of a cluster of ", cluster_blocks());
            return nullptr;
        }
        Block& block = *blocks_[rank];
        if (&block == block_) return &block;
        if (cluster_.agent < 0 || !causality.seen(cluster_.agent, cluster_.first_time)) {
            report.add("cluster", operation, " at block ", rank,
                       " before a barrier of the cluster: it may not run yet");
        }
        if (all_at(block, exited, 0, threads_)) {
            report.add("cluster", operation, " at block ", rank, ", which has ended");
            return nullptr;
        }
        block.visits[now.self()] = now.clock;
        return &block;
    }

    Thread& this_thread() { return block_->threads[now.thread]; }

    void become_exact() {
        if (causality.exact()) return;
        causality.become_exact();
        shared().become_exact();
    }

    // 16 bytes come past the L1, as those of load_from_l2 do.
    bool read_source(const Copy& copy) {
        return !copy.valid || global.read("copy_async", copy.from, copy.valid, 1,
                                          copy.bytes == 16 ? Global::Coherent : Global::Cached);
    }

    bool fits(const char* operation, const std::string& fault) {
        if (!fault.empty()) report.add("tensor map", operation, ": ", fault);
        return fault.empty();
    }

    bool may_start(const BulkCopy& copy) {
        if (!fits(copy.name, copy.fault())) return false;
        const size_t at = shared().offset(copy.shared), multiple = copy.alignment();
        if (at % multiple == 0) return true;
        report.add("misaligned", copy.name, " at shared ", at, " must be at a multiple of ", multiple);
        return false;
    }

    // Blocks

    void enter(Block& block) {
        block_ = &block;
        now.block_x = block.x;
        now.block_y = block.y;
        now.first = block.first;
        now.barriers = block.barriers;
        now.interval = block.interval;
        now.block = block.block;
    }

    void run_cluster(int x, int y) {
        const int count = static_cast<int>(blocks_.size());
        now.cluster = now.interval = ++now.clock;
        causality.begin_cluster(threads_, count);
        if (count > 1) causality.become_exact();
        global.begin_cluster(threads_, count);
        stopped_ = false;
        cluster_ = ClusterBarrier();
        for (int rank = 0; rank < count; ++rank) begin_block(*blocks_[rank], x + rank, y, rank);
        for (;;) {
            bool moved = false;
            for (const auto& block : blocks_) {
                moved |= advance(*block);
                if (stopped_) return;
            }
            if (moved || land_copies()) continue;
            return has_ended() ? check_end() : report_standstill();
        }
    }

    void begin_block(Block& block, int x, int y, int rank) {
        block.x = x;
        block.y = y;
        block.first = rank * threads_;
        block.barriers = 0;
        block.block = block.interval = ++now.clock;
        enter(block);
        block.shared.begin_block();
        block.mbarriers.begin_block();
        block.named.fill(NamedBarrier());
        block.visits.clear();
        for (Warpgroup& warpgroup : block.warpgroups) warpgroup.begin_block();
        for (int i = 0; i < threads_; ++i) {
            Thread& thread = block.threads[i];
            thread.fiber.start(Stacks::get().top(block.first + i), run_thread);
            thread.at = nullptr;
            thread.copies.clear();
            thread.stores.clear();
            thread.arrived = false;
        }
    }

    bool has_ended() const {
        return std::all_of(blocks_.begin(), blocks_.end(),
                           [&](const auto& block) { return all_at(*block, exited, 0, threads_); });
    }

    // As far as the block comes on its own; whether it moved at all.
    bool advance(Block& block) {
        enter(block);
        bool moved = false;
        for (int warp = 0; warp < threads_; warp += 32) {
            moved |= run_warp(warp);
            if (stopped_) return moved;
        }
        for (int group = 0; group + 128 <= threads_; group += 128) moved |= run_warpgroup(group);
        for (NamedBarrier& barrier : block.named) moved |= pass_named(barrier);
        return pass_barrier() || moved;
    }

    // Until all lanes wait for others, or have exited, or the block cannot go on.
    bool run_warp(int first) {
        bool moved = false;
        for (;;) {
            const Collective* place = nullptr;
            bool waits = false;
            for (int i = first; i < first + 32; ++i) {
                Thread& thread = block_->threads[i];
                if (can_run(thread)) {
                    thread.at = nullptr;
                    now.thread = i;
                    Fiber::change(scheduler_, thread.fiber);
                    moved = true;
                    if (report.hopeless()) return stopped_ = true;
                }
                if (thread.at->run && !place) place = thread.at;
                waits |= thread.at == &waiting;
            }
            // A lane may just have let others go on.
            Thread* const lanes = &block_->threads[first];
            if (std::any_of(lanes, lanes + 32, [&](const Thread& thread) { return can_run(thread); })) continue;
            // Who waits for an mbarrier may still come to where the others are.
            if (!place || waits) return moved;
            if (!all_at(*block_, *place, first, 32)) {
                report_apart("divergence", first, 32);
                return stopped_ = true;
            }
            if (place->lanes > 32) return moved;
            run_together(*place, first);
            moved = true;
        }
    }

    bool can_run(const Thread& thread) const {
        if (thread.at == &waiting) return thread.barrier->has_finished(thread.parity);
        if (thread.at == &clustered) return cluster_.phase != thread.cluster_phase;
        return !thread.at;
    }

    bool run_warpgroup(int first) {
        const Collective& place = *block_->threads[first].at;
        if (!place.run || place.lanes != 128 || !all_at(*block_, place, first, 128)) return false;
        run_together(place, first);
        return true;
    }

    void run_together(const Collective& place, int first) {
        Warpgroup* const warpgroup = place.lanes == 128 ? &block_->warpgroups[first / 128] : nullptr;
        Lanes lanes{now, report, block_->shared, causality, warpgroup, first, {}};
        Thread* const threads = &block_->threads[first];
        for (int lane = 0; lane < place.lanes; ++lane) lanes.arguments[lane] = threads[lane].arguments;
        place.run(lanes);
        for (int lane = 0; lane < place.lanes; ++lane) threads[lane].at = nullptr;
    }

    bool pass_named(NamedBarrier& barrier) {
        const size_t arrived = barrier.arrived.size();
        if (!arrived || arrived < static_cast<size_t>(barrier.expected)) return false;
        const int id = static_cast<int>(&barrier - block_->named.data());
        if (arrived > static_cast<size_t>(barrier.expected)) {
            report.add_for_block("named barrier", "sync_named ", id, " of ", barrier.expected, " threads, at which ",
                                 arrived, " have arrived");
        }
        std::vector<int> actors;
        for (const int thread : barrier.arrived) {
            if (!all_at(*block_, named, thread / 32 * 32, 32)) {
                report_apart("divergence", thread / 32 * 32, 32);
                return stopped_ = true;
            }
            actors.push_back(now.first + thread);
        }
        for (const int thread : barrier.arrived) block_->threads[thread].at = nullptr;
        causality.meet(actors);
        barrier.arrived.clear();
        return true;
    }

    bool pass_barrier() {
        if (!all_at(*block_, barrier, 0, threads_)) return false;
        for (Thread& thread : block_->threads) thread.at = nullptr;
        now.interval = block_->interval = ++now.clock;
        now.barriers = ++block_->barriers;
        if (causality.exact()) causality.meet(now.first, threads_);
        return true;
    }

    static bool all_at(const Block& block, const Collective& place, int first, int count) {
        return std::all_of(&block.threads[first], &block.threads[first] + count,
                           [&](const Thread& thread) { return thread.at == &place; });
    }

    // What one thread waits for, since nothing else can be done.
    bool land_copies() {
        for (const auto& block : blocks_) {
            enter(*block);
            for (const auto& [at, barrier] : block->mbarriers.all()) {
                const auto wants = [&barrier = barrier](const Thread& thread) {
                    return thread.at == &waiting && thread.barrier == &barrier;
                };
                const bool wanted = std::any_of(block->threads.begin(), block->threads.end(), wants);
                if (wanted && block->mbarriers.land(const_cast<Mbarrier&>(barrier), global)) return true;
            }
        }
        return false;
    }

    void check_end() {
        for (const auto& block : blocks_) {
            enter(*block);
            for (const auto& [at, barrier] : block->mbarriers.all()) {
                if (const size_t copies = barrier.copies.size()) {
                    report.add_for_block("pending copies", "at exit, not waited for at ", barrier.name(), ": ", copies);
                }
            }
            check_visits(*block);
            for (const Warpgroup& warpgroup : block->warpgroups) {
                if (const size_t products = warpgroup.unfinished()) {
                    report.add_for_block("pending products", "at exit, not waited for: ", products);
                }
            }
        }
    }

    // A block may end, and its shared memory with it, once one of its threads knows that nobody comes any more.
    void check_visits(const Block& block) {
        for (const auto& [visitor, time] : block.visits) {
            bool known = false;
            for (now.thread = 0; now.thread < threads_ && !known; ++now.thread) known = causality.seen(visitor, time);
            if (known) continue;
            report.add_for_block("cluster", "ends while ", causality.name(visitor), " may still use its shared memory");
            return;
        }
    }

    // Nothing can go on

    void report_standstill() {
        for (const auto& block : blocks_) {
            enter(*block);
            for (const auto& [at, barrier] : block->mbarriers.all()) {
                const bool wrong = !barrier.left && barrier.bytes != barrier.bytes_under_way();
                if (wrong) block->mbarriers.explain_bytes(barrier);
            }
        }
        for (const auto& block : blocks_) {
            enter(*block);
            const auto waits = [](const Thread& thread) {
                return thread.at == &waiting || thread.at == &named || thread.at == &clustered;
            };
            if (all_at(*block, exited, 0, threads_)) continue;
            if (std::any_of(block->threads.begin(), block->threads.end(), waits)) {
                report.add_for_block("deadlock", whereabouts(*block));
            } else {
                report_apart_in_block();
            }
        }
    }

    void report_apart_in_block() {
        for (int group = 0; group + 128 <= threads_; group += 128) {
            const bool together = block_->threads[group].at->lanes == 128;
            if (together) return report_apart("divergence", group, 128);
        }
        report_apart("barrier", 0, threads_);
    }

    // Who waits for what, those that stand together as one.
    std::string whereabouts(const Block& block) const {
        std::ostringstream text;
        for (int first = 0; first < threads_;) {
            const std::string place = place_of(block, block.threads[first]);
            int last = first;
            while (last + 1 < threads_ && place_of(block, block.threads[last + 1]) == place) ++last;
            text << (first ? "; " : "") << "thread" << (first == last ? " " : "s ") << first;
            if (first != last) text << " to " << last;
            text << (first == last ? " is at " : " are at ") << place;
            first = last + 1;
        }
        return text.str();
    }

    std::string place_of(const Block& block, const Thread& thread) const {
        const std::string name = thread.at->name;
        if (thread.at == &waiting) return name + " for " + thread.barrier->state();
        if (thread.at == &clustered) {
            return name + ", to which " + std::to_string(cluster_.arrived) + " of " +
                   std::to_string(threads_ * blocks_.size()) + " threads have come";
        }
        if (thread.at != &named) return name;
        const NamedBarrier& barrier = block.named[thread.named];
        return name + " " + std::to_string(thread.named) + ", which has had " + std::to_string(barrier.arrived.size()) +
               " of " + std::to_string(barrier.expected) + " threads";
    }

    void report_apart(const char* kind, int first, int count) {
        const std::vector<Thread>& threads = block_->threads;
        const Collective* const place = threads[first].at;
        const auto other = std::find_if(threads.begin() + first, threads.begin() + first + count,
                                        [&](const Thread& thread) { return thread.at != place; });
        if (other == threads.begin() + first + count) return;
        report.add_for_block(kind, "thread ", first, " is at ", place->name, " and thread ", other - threads.begin(),
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
        if (const size_t copies = machine.this_thread().copies.size()) {
            machine.report.add("pending copies", "at exit, not waited for: ", copies);
        }
        if (const size_t stores = machine.this_thread().stores.size()) {
            machine.report.add("pending stores", "at exit, not waited for: ", stores);
        }
        machine.meet(exited);
        std::abort();  // nobody goes on here
    }

    const std::function<void()>* kernel_ = nullptr;
    int threads_ = 0;  // of a block
    std::vector<std::unique_ptr<Block>> blocks_;  // of the cluster that runs
    Block* block_ = nullptr;  // that runs
    ClusterBarrier cluster_;
    Fiber scheduler_;
    bool stopped_ = false;
};

}  // namespace simt
