// Matrices that copies of tiles read and write, and what tells the hardware of them (tensor maps).
#pragma once

#include <common/tile_descriptor.cuh>

// cuda.h's CUtensorMap: what only describes boxes needs no toolkit.
struct CUtensorMap_st;

namespace sparsebert {

// A row-major matrix in global memory, and the box of it that a copy moves. Its rows begin at multiples of 16 bytes.
struct Box {
    uint64_t address;
    int element_bytes;  // 1 or 2
    int64_t inner;      // elements of a row
    int64_t outer;      // rows
    int64_t row_bytes;  // from one row to the next
    int box_inner;      // elements
    int box_outer;      // rows, 256 at most
    Swizzle swizzle;
};

// The map of a box, whose elements outside of the matrix are read as zeros. It is kept: the box says all that is in it,
// so memory that is freed and used again does no harm. std::runtime_error in the name of `op` without a driver, and
// where it does not take the box.
CUtensorMap_st tensor_map_of(const char* op, const Box& box);

}  // namespace sparsebert
