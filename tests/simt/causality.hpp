// Who knows of what, where threads synchronise otherwise than by barriers of the whole block.
//
// Actors are the threads of a cluster, and what the hardware does for them on its own (agents). An actor's deeds have
// times on the clock; another knows of all those before a time that was handed on to it, at a barrier of any kind.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "report.hpp"

namespace simt {

// By actor: the time before which everything that it did is known, and of this what the async proxy sees as well; and
// the time before which it is only known to have read.
struct Knowledge {
    std::vector<uint32_t> seen;
    std::vector<uint32_t> fenced;
    std::vector<uint32_t> read;

    void join(const Knowledge& other) {
        join(seen, other.seen);
        join(fenced, other.fenced);
        join(read, other.read);
    }
    // As if nothing but reads had been told of.
    void join_reads(const Knowledge& other) {
        join(read, other.seen);
        join(read, other.read);
    }
    void note_seen(size_t actor, uint32_t before) { note(seen, actor, before); }
    void note_fenced(size_t actor, uint32_t before) { note(fenced, actor, before); }
    // What the other knows as well.
    void keep(const Knowledge& other) {
        keep(seen, other.seen);
        keep(fenced, other.fenced);
        keep(read, other.read);
    }
    static bool has(const std::vector<uint32_t>& times, size_t actor, uint32_t time) {
        return actor < times.size() && time < times[actor];
    }

  private:
    static void join(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
        if (to.size() < from.size()) to.resize(from.size());
        for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
    }
    static void keep(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
        to.resize(std::min(to.size(), from.size()));
        for (size_t i = 0; i < to.size(); ++i) to[i] = std::min(to[i], from[i]);
    }
    static void note(std::vector<uint32_t>& times, size_t actor, uint32_t before) {
        if (times.size() <= actor) times.resize(actor + 1);
        times[actor] = std::max(times[actor], before);
    }
};

class Causality {
  public:
    explicit Causality(Now& now) : now_(now) {}

    void begin_cluster(int threads, int blocks) {
        threads_ = threads;
        count_ = threads * blocks;
        agents_.clear();
        if (exact_) clear();
    }

    // As long as only barriers of the whole block synchronise, the last of them says all. The first other thing that
    // does switches to knowledge for each thread, for all blocks to come.
    bool exact() const { return exact_; }
    void become_exact() {
        exact_ = true;
        clear();
        for (Knowledge& one : knowledge_) one.seen.assign(count_, now_.interval);
    }

    int add_agent(const std::string& name) {
        agents_.push_back(name);
        return count_ + static_cast<int>(agents_.size()) - 1;
    }
    bool is_agent(int actor) const { return actor >= count_; }
    std::string name(int actor) const {
        if (is_agent(actor)) return agents_[actor - count_];
        const int own = now_.first / threads_, rank = actor / threads_;
        return "thread " + std::to_string(actor % threads_) +
               (rank == own ? "" : " of block " + std::to_string(rank) + " of the cluster");
    }

    // Does the thread that runs know what the actor did at this time?
    bool seen(int actor, uint32_t time) const {
        if (judge_) return Knowledge::has(judge_->seen, actor, time);
        return actor == now_.self() || (exact_ && Knowledge::has(mine().seen, actor, time));
    }
    // Or at least that it has read, if it did so then? An agent's writes are over as well where a reader has met them.
    bool seen_reading(int actor, uint32_t time) const {
        return seen(actor, time) || (exact_ && Knowledge::has((judge_ ? *judge_ : mine()).read, actor, time));
    }
    bool fenced(int actor, uint32_t time) const {
        return Knowledge::has((judge_ ? *judge_ : mine()).fenced, actor, time);
    }
    // In place of what that thread knows; null ends it.
    void judge_by(const Knowledge* judge) { judge_ = judge; }
    // What one thread of each part of them knows, and all of these do.
    Knowledge common(int first, int threads, int parts) {
        Knowledge common;
        for (int part = 0; part < parts; ++part) {
            const int actor = first + part * (threads / parts);
            Knowledge one = knowledge_[actor];
            one.note_seen(actor, now_.clock + 1);
            if (part) {
                common.keep(one);
            } else {
                common = one;
            }
        }
        return common;
    }
    // These threads know of all that an agent has done.
    void tell(int first, int threads, int agent) {
        ++now_.clock;
        for (int i = 0; i < threads; ++i) knowledge_[first + i].note_seen(agent, now_.clock);
    }
    const Knowledge& mine() const { return knowledge_[now_.self()]; }

    // What this thread wrote before is seen by the async proxy.
    void fence() { knowledge_[now_.self()].note_fenced(now_.self(), ++now_.clock); }

    // Hands on what this thread did and knows; takes what was handed on.
    void release(Knowledge& to) {
        knowledge_[now_.self()].note_seen(now_.self(), ++now_.clock);
        to.join(mine());
    }
    void release_reads(Knowledge& to) {
        knowledge_[now_.self()].note_seen(now_.self(), ++now_.clock);
        to.join_reads(mine());
    }
    void acquire(const Knowledge& from) { knowledge_[now_.self()].join(from); }

    // These threads meet: each knows then what any of them did and knew.
    void meet(const std::vector<int>& actors) {
        ++now_.clock;
        Knowledge all;
        for (const int actor : actors) {
            knowledge_[actor].note_seen(actor, now_.clock);
            all.join(knowledge_[actor]);
        }
        for (const int actor : actors) knowledge_[actor] = all;
    }
    void meet(int first, int count) {
        std::vector<int> actors(count);
        for (int i = 0; i < count; ++i) actors[i] = first + i;
        meet(actors);
    }

  private:
    void clear() { knowledge_.assign(count_, Knowledge()); }

    Now& now_;
    bool exact_ = false;
    int threads_ = 0;  // of a block
    int count_ = 0;    // of the cluster
    std::vector<Knowledge> knowledge_;
    const Knowledge* judge_ = nullptr;
    std::vector<std::string> agents_;
};

}  // namespace simt
