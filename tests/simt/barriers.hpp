// The barriers of a block that are no sync_block: mbarriers in shared memory, and named barriers.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "bulk.hpp"
#include "causality.hpp"
#include "memory.hpp"
#include "report.hpp"

namespace simt {

// An mbarrier. A phase ends when nobody is expected any more, neither threads nor bytes.
struct Mbarrier {
    size_t at;  // in shared memory
    int count;
    int left;           // arrivals that the phase still takes
    int64_t bytes = 0;  // expected and not there yet
    int phase = 0;
    int initializer;
    uint32_t initialized;
    bool fenced = false;  // since its initialization, by who did that
    int agent;            // who writes what the copies bring
    // Who ended the last phase, and when.
    int finisher = -1;
    uint32_t finished = 0;
    bool finished_from_afar = false;
    // What its waiters learn: from the block and its copies, and from other blocks of the cluster.
    Knowledge arriving;
    Knowledge arriving_from_afar;
    Knowledge finishing;
    Knowledge finishing_from_afar;
    std::vector<BulkCopy> copies;  // under way to the memory beside it

    bool has_finished(int parity) const { return (phase & 1) != parity; }
    int64_t bytes_under_way() const {
        int64_t sum = 0;
        for (const BulkCopy& copy : copies) sum += copy.bytes();
        return sum;
    }
    std::string name() const { return "the barrier at shared " + std::to_string(at); }
    std::string state() const {
        std::string text = "phase " + std::to_string(phase) + " of " + name() + ", which has had " +
                           std::to_string(count - left) + " of " + std::to_string(count) + " arrivals";
        if (bytes) text += " and expects " + std::to_string(bytes) + " bytes more";
        return text;
    }
};

// From the same block; from another one; from any, and nothing but what was read is told of.
enum class Arrival { near, afar, of_reads };

class Mbarriers {
  public:
    static constexpr size_t SIZE = 8;
    static constexpr int MOST = (1 << 20) - 1;  // of arrivals, and of bytes

    Mbarriers(Now& now, Causality& causality, Report& report, Shared& shared)
        : now_(now), causality_(causality), report_(report), shared_(shared) {}

    void begin_block() { barriers_.clear(); }

    void init(void* pointer, int count) {
        static const char* const NAME = "init_barrier";
        if (count < 1 || count > MOST) {
            report_.add("barrier", NAME, " with ", count, " arrivals, expected 1 to ", int{MOST});
            return;
        }
        const size_t at = shared_.offset(pointer);
        const auto next = barriers_.upper_bound(at + SIZE - 1);
        if (next != barriers_.begin() && std::prev(next)->first + SIZE > at) {
            report_.add("barrier", NAME, " at shared ", at, ", where a barrier is in use from ",
                        std::prev(next)->first);
            return;
        }
        if (!shared_.reserve(NAME, pointer, SIZE)) return;
        Mbarrier barrier{};
        barrier.at = at;
        barrier.count = barrier.left = count;
        barrier.initializer = now_.self();
        barrier.initialized = now_.clock;
        barrier.agent = causality_.add_agent("a bulk copy for " + barrier.name());
        barriers_.emplace(at, std::move(barrier));
    }

    // The async proxy and other blocks see what this thread has initialized.
    void fence_init() {
        for (auto& [at, barrier] : barriers_) barrier.fenced |= barrier.initializer == now_.self();
    }

    // The barrier at this address, if the thread may use it.
    Mbarrier* find(const char* operation, const void* pointer, bool fenced = false) {
        const size_t at = shared_.offset(pointer);
        const auto found = barriers_.find(at);
        if (found == barriers_.end()) {
            report_.add("barrier", operation, " at shared ", static_cast<ptrdiff_t>(at), ", where there is none");
            return nullptr;
        }
        Mbarrier& barrier = found->second;
        if (!causality_.seen(barrier.initializer, barrier.initialized)) {
            report_.add("race", operation, " uses ", barrier.name(), ", which ",
                        causality_.name(barrier.initializer), " initialized at the same time");
        }
        if (fenced && !barrier.fenced) {
            report_.add("proxy", operation, " uses ", barrier.name(), ", which ",
                        causality_.name(barrier.initializer), " initialized without fence_barrier_init");
        }
        return &barrier;
    }

    void arrive(const char* operation, Mbarrier& barrier, int bytes, Arrival arrival = Arrival::near) {
        if (bytes < 0 || barrier.bytes + bytes > MOST) {
            report_.add("barrier", operation, " expects ", bytes, " bytes, and ", barrier.bytes, " before, of at most ",
                        int{MOST});
        }
        // Who does not know that the last phase has ended may as well have arrived in it. (Between blocks, copies may
        // have told, of which nothing is known here.)
        const bool near = arrival == Arrival::near && !barrier.finished_from_afar;
        const bool early = near && barrier.phase && !causality_.seen_reading(barrier.finisher, barrier.finished);
        if (!barrier.left || early) {
            report_.add("too many arrivals", operation, " at ", barrier.name(), " in phase ",
                        barrier.left ? barrier.phase - 1 : barrier.phase, ", which has had all ", barrier.count);
            if (!barrier.left) return;
        }
        if (arrival == Arrival::of_reads) {
            causality_.release_reads(barrier.arriving);
        } else {
            causality_.release(arrival == Arrival::near ? barrier.arriving : barrier.arriving_from_afar);
        }
        barrier.bytes += bytes;
        --barrier.left;
        finish_phase(barrier, now_.self(), now_.clock - 1, arrival != Arrival::near);
    }

    void start(Mbarrier& barrier, BulkCopy copy) { barrier.copies.push_back(std::move(copy)); }

    // The copies that a phase waits for arrive, and nothing else does. False where they cannot end it.
    bool land(Mbarrier& barrier, Global& global) {
        if (barrier.left || barrier.copies.empty() || barrier.bytes_under_way() != barrier.bytes) return false;
        const uint32_t time = ++now_.clock;
        for (const BulkCopy& copy : barrier.copies) {
            copy.read_global(shared_.data(), global);
            shared_.end_bulk(copy.shared, copy.bytes(), barrier.agent);
        }
        barrier.copies.clear();
        barrier.bytes = 0;
        barrier.arriving.note_seen(barrier.agent, ++now_.clock);
        finish_phase(barrier, barrier.agent, time, false);
        return true;
    }

    // Where a phase has had its arrivals, but other bytes are coming than it expects.
    void explain_bytes(const Mbarrier& barrier) {
        report_.add("wrong bytes", "phase ", barrier.phase, " of ", barrier.name(), " expects ", barrier.bytes,
                    " bytes, and ", barrier.bytes_under_way(), " are coming");
    }

    const std::map<size_t, Mbarrier>& all() const { return barriers_; }

  private:
    void finish_phase(Mbarrier& barrier, int finisher, uint32_t time, bool from_afar) {
        if (barrier.left || barrier.bytes) return;
        if (!barrier.copies.empty()) explain_bytes(barrier);
        ++barrier.phase;
        barrier.left = barrier.count;
        barrier.finishing = barrier.arriving;
        barrier.finishing_from_afar = barrier.arriving_from_afar;
        barrier.finisher = finisher;
        barrier.finished = time;
        barrier.finished_from_afar = from_afar;
    }

    Now& now_;
    Causality& causality_;
    Report& report_;
    Shared& shared_;
    std::map<size_t, Mbarrier> barriers_;
};

// That of all threads of a cluster.
struct ClusterBarrier {
    int phase = 0;
    int arrived = 0;
    Knowledge arriving;
    Knowledge finishing;
    // Does the first phase for all: who knows of it knows that all blocks run.
    int agent = -1;
    uint32_t first_time = 0;
};

// One of the 16 that a block has; number 0 is that of sync_block.
struct NamedBarrier {
    int expected = 0;  // threads, as the first to arrive says
    std::vector<int> arrived;
};

}  // namespace simt
