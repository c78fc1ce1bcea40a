"""What the kernels of y = activation(x Wᵀ + b) share: a tile of the product W xᵀ, features by tokens, with its
configuration, its edges and its epilogue; and unpacking a tile of a packed weight in registers."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Config(NamedTuple):
    """BLOCK_M features by BLOCK_N tokens by BLOCK_K inputs a step; ``split_k`` programs share the inputs of a tile."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def tile_edges(tokens, out_features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows of W and the tokens of this program's tile, and which of them there are."""
    # Programs that follow each other share their tokens, whose tile then comes from L2.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, rows < out_features, columns, columns < tokens


@triton.jit
def store_tile(
    accumulator,
    bias_ptr,
    y_ptr,
    features,
    feature_mask,
    columns,
    column_mask,
    out_features,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """y[columns, features] = activation(accumulator + bias), of a float32 tile [BLOCK_M, BLOCK_N]."""
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + features, mask=feature_mask, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + columns[None, :].to(tl.int64) * out_features + features[:, None]
    y = activate(accumulator, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptrs, y, mask=feature_mask[:, None] & column_mask[None, :])


@triton.jit
def store_partial(accumulator, partial_ptr, split, rows, row_mask, columns, column_mask, tokens, out_features):
    """What one split leaves for ``split_k``: its tile of ``(SPLIT_K, tokens, out_features)``."""
    places = (split.to(tl.int64) * tokens + columns[None, :]) * out_features + rows[:, None]
    tl.store(partial_ptr + places, accumulator, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def load_nm_tile(
    values_ptr,
    positions_ptr,
    rows,
    row_mask,
    first_column,
    kept,
    position_bytes,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns ``first_column`` to ``first_column + BLOCK_K`` of ``rows`` of a weight at KEEP of GROUP, as a dense tile.

    Memory gives the packed tensors of ``formats.nm`` alone: ``values (., kept)`` and ``positions (., position_bytes)``
    with BITS bits a position, little-endian. ``first_column`` is a multiple of BLOCK_K, and that of 8 groups. Columns
    past the end, and rows that ``row_mask`` leaves out, are zero.
    """
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    if KEEP & (KEEP - 1) == 0:
        SLOTS: tl.constexpr = KEEP
        COLUMNS: tl.constexpr = GROUPS * KEEP
        PER_BYTE: tl.constexpr = 8 // BITS
        columns = first_column // GROUP * KEEP + tl.arange(0, COLUMNS)
        # A byte holds several positions: load each once, then take it apart.
        first_byte = first_column // GROUP * KEEP // PER_BYTE
        bytes_ = first_byte + tl.arange(0, COLUMNS // PER_BYTE)
        packed = tl.load(
            positions_ptr + rows[:, None] * position_bytes + bytes_[None, :],
            mask=row_mask[:, None] & (bytes_ < position_bytes)[None, :],
            other=0,
        )  # [BLOCK_M, COLUMNS / PER_BYTE]
        shifts = (tl.arange(0, PER_BYTE) * BITS)[None, None, :]
        places = (packed[:, :, None].to(tl.int32) >> shifts) & ((1 << BITS) - 1)
        mask = (columns < kept)[None, :]
    else:
        # Tiles have powers of two as sides: the slots above KEEP hold nothing.
        SLOTS: tl.constexpr = triton.next_power_of_2(KEEP)  # type: ignore[no-redef]
        COLUMNS: tl.constexpr = GROUPS * SLOTS  # type: ignore[no-redef]
        slots = tl.arange(0, COLUMNS)
        columns = (first_column // GROUP + slots // SLOTS) * KEEP + slots % SLOTS
        mask = ((columns < kept) & (slots % SLOTS < KEEP))[None, :]
        bits = columns * BITS
        packed = tl.load(
            positions_ptr + rows[:, None] * position_bytes + (bits // 8)[None, :],
            mask=row_mask[:, None] & mask,
            other=0,
        )
        places = (packed.to(tl.int32) >> (bits % 8)[None, :]) & ((1 << BITS) - 1)
    values = tl.load(
        values_ptr + rows[:, None].to(tl.int64) * kept + columns[None, :], mask=row_mask[:, None] & mask, other=0.0
    )  # [BLOCK_M, COLUMNS]
    values = tl.reshape(values, (BLOCK_M, GROUPS, SLOTS))
    places = tl.reshape(places, (BLOCK_M, GROUPS, SLOTS))
    inside = tl.arange(0, GROUP)[None, None, :]
    if SLOTS == 1:
        dense = _place(tl.reshape(values, (BLOCK_M, GROUPS)), tl.reshape(places, (BLOCK_M, GROUPS)), inside)
    elif SLOTS == 2:
        # Apart at once, where a sum over the slots would pass them from thread to thread.
        dense = _place_two(values, places, inside)
    elif SLOTS == 4:
        even, odd = tl.split(tl.reshape(values, (BLOCK_M, GROUPS, 2, 2)))
        even_places, odd_places = tl.split(tl.reshape(places, (BLOCK_M, GROUPS, 2, 2)))
        dense = _place_two(even, even_places, inside) + _place_two(odd, odd_places, inside)
    else:
        here = places[:, :, :, None] == inside[:, :, None, :]
        # One term of each sum is the weight and the others are zero; what is masked is zero wherever it lands.
        dense = tl.sum(tl.where(here, values[:, :, :, None], 0).to(values.dtype), axis=2)
    return tl.reshape(dense.to(values_ptr.dtype.element_ty), (BLOCK_M, BLOCK_K))


@triton.jit
def _place_two(values, places, inside):
    """Two values of each group, [M, GROUPS, 2]; at most one of the addends is not zero."""
    first, second = tl.split(values)
    first_places, second_places = tl.split(places)
    return _place(first, first_places, inside) + _place(second, second_places, inside)


@triton.jit
def _place(values, places, inside):
    """One value of each group at its place, the rest of the group zero: [M, GROUPS] -> [M, GROUPS, GROUP]."""
    return tl.where(places[:, :, None] == inside, values[:, :, None], 0).to(values.dtype)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activation of that name, of float32 ``y``; NaN stays NaN."""
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # x (1 + tanh u) / 2 = x sigmoid(2 u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    return y


@triton.jit
def load_bitmap_tile(
    values_ptr,
    bitmap_ptr,
    begins,
    rows,
    row_mask,
    first_column,
    row_bytes,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns ``first_column`` to ``first_column + BLOCK_K`` of ``rows`` of a bitmap weight as a dense tile, and where
    in ``values`` each row goes on after them.

    ``begins int64 (BLOCK_M)`` is where each row's values from ``first_column`` on begin. Bits past the end of a row are
    zero in ``formats.bitmap``, and bytes past it are not read.
    """
    bits = load_bits(bitmap_ptr, rows, row_mask, first_column, row_bytes, BLOCK_K)
    return load_set(values_ptr, begins, bits, BLOCK_M, BLOCK_K)


@triton.jit
def load_bits(bitmap_ptr, rows, row_mask, first_column, row_bytes, BLOCK_K: tl.constexpr):
    """The bits of those columns, ``uint8 (BLOCK_M, BLOCK_K / 8)``."""
    bytes_ = first_column // 8 + tl.arange(0, BLOCK_K // 8)
    return tl.load(
        bitmap_ptr + rows[:, None].to(tl.int64) * row_bytes + bytes_[None, :],
        mask=row_mask[:, None] & (bytes_ < row_bytes)[None, :],
        other=0,
    )


@triton.jit
def load_set(values_ptr, begins, bits, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The values of the set ``bits`` at their columns, ``(BLOCK_M, BLOCK_K)``, and where each row goes on after them.

    A value's place is the number of bits before its own. Summed along columns these would pass from thread to thread;
    so only those of whole bytes are, and each column counts those before it in its byte.
    """
    bits = bits.to(tl.uint32)
    counts = _count_bits(bits)
    # One number for both takes one exchange through shared memory to the threads that have the columns.
    before = (tl.cumsum(counts, axis=1) - counts).to(tl.uint32)
    packed = (before << 8 | bits)[:, :, None]
    own = (tl.full((8,), 1, tl.uint32) << tl.arange(0, 8).to(tl.uint32))[None, None, :]
    places = (packed >> 8).to(tl.int32) + _count_bits(packed & (own - 1))
    values = tl.load((values_ptr + begins)[:, None, None] + places, mask=(packed & own) != 0, other=0.0)
    return tl.reshape(values, (BLOCK_M, BLOCK_K)), begins + tl.sum(counts, axis=1)


@triton.jit
def _count_bits(x):
    """How many bits of uint32 are set: LLVM makes one instruction of this."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)
