// Copies of whole tiles between global and shared memory, which the hardware makes on its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "memory.hpp"

namespace simt {

// How the 16-byte chunks of 8 rows are spread over the banks: the bytes of a row that change places.
enum class Swizzle : int { none = 16, bytes32 = 32, bytes64 = 64, bytes128 = 128 };

// The bits of an address that say which 16 bytes of a row are meant, xor those that say which row it is.
inline size_t swizzled(size_t address, Swizzle swizzle) {
    const size_t chunks = static_cast<size_t>(swizzle) / 16 - 1;
    return address ^ ((address >> 7 & chunks) << 4);
}
// After so many bytes the pattern begins again.
inline size_t pattern_bytes(Swizzle swizzle) {
    return swizzle == Swizzle::none ? 128 : 8 * static_cast<size_t>(swizzle);
}

// A matrix in global memory, and the box of it that a copy moves. Innermost first.
struct TensorMap {
    uint8_t* base;
    int element_bytes;
    int64_t extents[2];
    int64_t row_bytes;  // from one row to the next
    int box[2];
    Swizzle swizzle;

    int box_row_bytes() const { return box[0] * element_bytes; }
    int box_bytes() const { return box_row_bytes() * box[1]; }

    // What no tensor map may be, or nothing.
    std::string fault() const {
        const auto expect = [](const std::string& what, int64_t got, const std::string& expected) {
            return what + " is " + std::to_string(got) + ", expected " + expected;
        };
        for (const int extent : box) {
            if (extent < 1 || extent > 256) return expect("an extent of the box", extent, "1 to 256");
        }
        for (const int64_t extent : extents) {
            if (extent < 1 || extent > int64_t{1} << 32) return expect("an extent", extent, "1 to 2^32");
        }
        if (reinterpret_cast<uintptr_t>(base) % 16) {
            return expect("the base modulo 16", reinterpret_cast<uintptr_t>(base) % 16, "0");
        }
        if (row_bytes % 16 || row_bytes < extents[0] * element_bytes || row_bytes >= int64_t{1} << 40) {
            return expect("the stride in bytes", row_bytes, "a multiple of 16 that a row fits into");
        }
        if (swizzle == Swizzle::none) {
            if (box_row_bytes() % 16) return expect("a row of the box in bytes", box_row_bytes(), "a multiple of 16");
        } else if (box_row_bytes() != static_cast<int>(swizzle)) {
            return expect("a row of the box in bytes", box_row_bytes(),
                          std::to_string(static_cast<int>(swizzle)) + ", which the swizzle takes");
        }
        return "";
    }
};

// One copy under way. What lies outside of the matrix is read as zeros, and not written.
struct BulkCopy {
    const char* name;
    TensorMap map;
    int64_t inner;  // where in the matrix the box begins
    int64_t outer;
    uint8_t* shared;
    bool is_flat = false;

    // Of so many bytes in a row.
    static BulkCopy flat(const char* name, const void* global, int bytes, void* shared) {
        auto* const base = static_cast<uint8_t*>(const_cast<void*>(global));
        const TensorMap map{base, 1, {bytes, 1}, bytes, {bytes, 1}, Swizzle::none};
        return {name, map, 0, 0, static_cast<uint8_t*>(shared), true};
    }

    std::string fault() const {
        if (!is_flat) return map.fault();
        const bool fits = bytes() % 16 == 0 && reinterpret_cast<uintptr_t>(map.base) % 16 == 0;
        return fits ? "" : std::to_string(bytes()) + " bytes from an address that is " +
                               std::to_string(reinterpret_cast<uintptr_t>(map.base) % 16) +
                               " modulo 16, expected multiples of 16";
    }
    size_t bytes() const { return map.box_bytes(); }
    // In shared memory: the pattern begins with the copy.
    size_t alignment() const { return is_flat ? 16 : pattern_bytes(map.swizzle); }

    // May it read what it reads?
    void check_global(Global& global) const {
        for (int row = 0; row < map.box[1]; ++row) {
            if (const size_t size = valid_bytes(row)) global.read(name, global_row(row), size, 1, Global::Coherent);
        }
    }

    // memory: the shared memory that a swizzle counts from.
    void read_global(uint8_t* memory, Global& global) const {
        std::vector<uint8_t> bytes(map.box_row_bytes());
        for (int row = 0; row < map.box[1]; ++row) {
            std::fill(bytes.begin(), bytes.end(), uint8_t{0});
            const size_t size = valid_bytes(row);
            if (size && global.read(name, global_row(row), size, 1, Global::Coherent)) {
                std::memcpy(bytes.data() + skipped_bytes(), global_row(row), size);
            }
            for (size_t at = 0; at < bytes.size(); at += 16) std::memcpy(chunk(memory, row, at), &bytes[at], 16);
        }
    }

    void write_global(uint8_t* memory, Global& global) const {
        std::vector<uint8_t> bytes(map.box_row_bytes());
        for (int row = 0; row < map.box[1]; ++row) {
            const size_t size = valid_bytes(row);
            if (!size || !global.write(name, global_row(row), size, 1)) continue;
            for (size_t at = 0; at < bytes.size(); at += 16) std::memcpy(&bytes[at], chunk(memory, row, at), 16);
            std::memcpy(global_row(row), bytes.data() + skipped_bytes(), size);
        }
    }

  private:
    int64_t first() const { return std::max<int64_t>(0, -inner); }  // element of the box that exists
    size_t skipped_bytes() const { return first() * map.element_bytes; }
    size_t valid_bytes(int row) const {
        if (outer + row < 0 || outer + row >= map.extents[1]) return 0;
        const int64_t end = std::min<int64_t>(map.box[0], map.extents[0] - inner);
        return end <= first() ? 0 : (end - first()) * map.element_bytes;
    }
    uint8_t* global_row(int row) const {
        return map.base + (outer + row) * map.row_bytes + (inner + first()) * map.element_bytes;
    }
    uint8_t* chunk(uint8_t* memory, int row, size_t at) const {
        return memory + swizzled(shared - memory + row * map.box_row_bytes() + at, map.swizzle);
    }
};

}  // namespace simt
