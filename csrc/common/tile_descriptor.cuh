// How a product of four warps is told where an operand lies in shared memory (wgmma's matrix descriptor).
#pragma once

#include <common/elements.h>

namespace sparsebert {

// Rows lie in chunks of 16 bytes, whose places in groups of 8 rows are exchanged as copies of tiles do it. The numbers
// are the descriptor's; without a swizzle, 8 rows of one chunk lie together.
enum class Swizzle : int { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

// Of the operand of one product, whose rows run along k. address: shared memory's own, of the first byte that the
// product takes of the first row; within a swizzled row, those of the next products follow. leading: bytes from a chunk
// to the next one along k, without a swizzle; stride: bytes from 8 rows to the next 8. All are multiples of 16.
SB_BOTH constexpr uint64_t describe_tile(uint32_t address, int leading, int stride, Swizzle swizzle) {
    constexpr uint64_t FIELD = 0x3fff;  // in units of 16 bytes
    return (address >> 4 & FIELD) | (static_cast<uint64_t>(leading) >> 4 & FIELD) << 16 |
           (static_cast<uint64_t>(stride) >> 4 & FIELD) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// The same operand, so many bytes further: along k, or in another stage.
SB_BOTH constexpr uint64_t move_tile(uint64_t descriptor, int bytes) {
    return descriptor + static_cast<uint64_t>(static_cast<int64_t>(bytes) / 16);
}

}  // namespace sparsebert
