// What went wrong, and who was running.
#pragma once

#include <cstdint>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

struct Now {
    int thread = 0;
    int block_x = 0;
    int block_y = 0;
    int barriers = 0;  // that this block has passed
    int first = 0;     // the number of the block's first thread among those of its cluster

    // Numbers that grow over all launches, so that what is noted beside a byte never has to be cleared. The clock steps
    // at each block, barrier, fence and atomic, and wherever a thread tells others what it has done; block, cluster and
    // launch are the clock at their beginning, interval is the clock at the last barrier of the whole block, or at the
    // block's beginning. Zero is before everything.
    uint32_t clock = 0;
    uint32_t interval = 0;
    uint32_t block = 0;
    uint32_t cluster = 0;
    uint32_t launch = 0;

    int self() const { return first + thread; }
    std::string since() const { return barriers ? "since barrier " + std::to_string(barriers) : "since the start"; }
};

// Keeps the first lines, not all of one kind: the lanes of a warp mostly do the same thing wrong.
class Report {
  public:
    explicit Report(const Now& now) : now_(now) {}

    // A mistake of the thread that runs.
    template <typename... Parts>
    void add(const char* kind, const Parts&... parts) {
        add_for_block(kind, "thread ", now_.thread, ": ", parts...);
    }
    template <typename... Parts>
    void add_for_block(const char* kind, const Parts&... parts) {
        ++count_;
        if (lines_.size() == LINES || ++of_kind_[kind] > LINES_OF_KIND) return;
        std::ostringstream line;
        line << kind << ": block (" << now_.block_x << ", " << now_.block_y << "), ";
        (line << ... << parts);
        lines_.push_back(line.str());
    }

    bool empty() const { return count_ == 0; }
    // Going on would only take time.
    bool hopeless() const { return count_ >= 1000; }

    // Throws what there is, and begins anew.
    void raise() {
        if (empty()) return;
        std::string message;
        for (const std::string& line : lines_) message += line + "\n";
        if (count_ > lines_.size()) message += "and " + std::to_string(count_ - lines_.size()) + " more\n";
        message.pop_back();
        lines_.clear();
        of_kind_.clear();
        count_ = 0;
        throw std::runtime_error(message);
    }

  private:
    static constexpr size_t LINES = 10;
    static constexpr int LINES_OF_KIND = 3;
    const Now& now_;
    std::vector<std::string> lines_;
    std::map<std::string, int> of_kind_;
    size_t count_ = 0;
};

}  // namespace simt
