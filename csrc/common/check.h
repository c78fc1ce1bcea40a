// What the checks of every op's calls are made of.
#pragma once

#include <common/errors.h>

#include <cstdint>

namespace sparsebert {

// Refuses in the name of an op: "nm24_linear: rank is 8, expected a multiple of 16".
class Checker {
  public:
    explicit constexpr Checker(const char* op) : op_(op) {}

    [[noreturn]] void refuse(const std::string& found, const std::string& expected) const {
        sparsebert::refuse(op_, found, expected);
    }

    void range(const char* name, int64_t value, int64_t least, int64_t most) const {
        if (value < least || value > most)
            refuse(is(name, value), std::to_string(least) + (most > least ? " to " + std::to_string(most) : ""));
    }

    void multiple(const char* name, int64_t value, int64_t of) const {
        if (value % of) refuse(is(name, value), "a multiple of " + std::to_string(of));
    }

    void address(const char* name, uint64_t address, uint64_t alignment, bool needed = true) const {
        if (needed && !address) refuse(std::string(name) + " is missing", "a tensor on the device");
        if (address % alignment) {
            refuse(
                std::string(name) + " begins " + std::to_string(address % alignment) + " bytes past a multiple of " +
                    std::to_string(alignment),
                "that multiple"
            );
        }
    }

  private:
    static std::string is(const char* name, int64_t value) {
        return std::string(name) + " is " + std::to_string(value);
    }

    const char* op_;
};

}  // namespace sparsebert
