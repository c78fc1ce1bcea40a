"""What the kernels of y = activation(x Wᵀ + b) share: a tile of the product W xᵀ, features by tokens, with its
configuration, its edges and its epilogue; and unpacking a tile of a packed weight in registers."""

from __future__ import annotations

import os
from typing import NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Added and taken away, it leaves a float32 below 2**22 rounded to the nearest whole number, ties to even.
_ROUND = tl.constexpr(1.5 * 2.0**23)


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
def to_int8(y):
    """clamp(rint(y), -127, 127) of float32 ``y`` as int8. Where y is a product, it needs ``enable_fp_fusion=False``."""
    # Clamped first: the bounds are whole numbers, so rounding does not leave them.
    clamped = tl.minimum(tl.maximum(y, -127.0), 127.0)
    return ((clamped + _ROUND) - _ROUND).to(tl.int8)


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
    y_inverse=1.0,
):
    """y[columns, features] = activation(accumulator + bias), of a float32 tile [BLOCK_M, BLOCK_N]; into an int8 y
    rounded, times ``y_inverse``."""
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + features, mask=feature_mask, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + columns[None, :].to(tl.int64) * out_features + features[:, None]
    y = activate(accumulator, ACTIVATION)
    if y_ptr.dtype.element_ty == tl.int8:
        y = to_int8(y * y_inverse)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=feature_mask[:, None] & column_mask[None, :])


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
    SHORT: tl.constexpr = values_ptr.dtype.element_ty.primitive_bitwidth <= 16
    if SHORT and (KEEP == 1 or KEEP == 2 or KEEP == 4) and (GROUP == 4 or GROUP == 8):
        return _load_by_permuting(
            values_ptr,
            positions_ptr,
            rows,
            row_mask,
            first_column,
            kept,
            position_bytes,
            KEEP,
            GROUP,
            BITS,
            BLOCK_M,
            BLOCK_K,
        )
    else:
        return _load_by_shifting(
            values_ptr,
            positions_ptr,
            rows,
            row_mask,
            first_column,
            kept,
            position_bytes,
            KEEP,
            GROUP,
            BITS,
            BLOCK_M,
            BLOCK_K,
        )


@triton.jit
def _load_by_permuting(
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
    """``load_nm_tile`` for elements of 8 and 16 bits: a register of a group, 4 or 2 elements, is one permutation of the
    bytes of the two values that fall into it, and zero.

    For each of its bytes a permutation has a selector of 4 bits: that of a byte of the values, or 4, which is zero. The
    selectors of a whole group are zeros' with one exclusive or for each value, at its position.
    """
    WIDTH: tl.constexpr = values_ptr.dtype.element_ty.primitive_bitwidth
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    # Values come in pairs, those of a group of 4 as two pairs.
    TAKEN: tl.constexpr = 2 if KEEP > 1 else 1
    PAIRS: tl.constexpr = KEEP // TAKEN
    UNITS: tl.constexpr = GROUPS * PAIRS
    if WIDTH * TAKEN == 32:
        unit_ptr = values_ptr.to(tl.pointer_type(tl.uint32))
    elif WIDTH * TAKEN == 16:
        unit_ptr = values_ptr.to(tl.pointer_type(tl.uint16))
    else:
        unit_ptr = values_ptr.to(tl.pointer_type(tl.uint8))
    first = first_column // GROUP * PAIRS
    units = first + tl.arange(0, UNITS)
    row_units = kept // TAKEN
    values = tl.load(
        unit_ptr + rows[:, None].to(tl.int64) * row_units + units[None, :],
        mask=row_mask[:, None] & (units < row_units)[None, :],
        other=0,
    ).to(tl.uint32)  # [BLOCK_M, UNITS]
    # A byte holds the positions of several units: load each once, then take it apart.
    CODE_BITS: tl.constexpr = TAKEN * BITS
    PER_BYTE: tl.constexpr = 8 // CODE_BITS
    bytes_ = first // PER_BYTE + tl.arange(0, UNITS // PER_BYTE)
    packed = tl.load(
        positions_ptr + rows[:, None] * position_bytes + bytes_[None, :],
        mask=row_mask[:, None] & (bytes_ < position_bytes)[None, :],
        other=0,
    )
    codes = packed[:, :, None].to(tl.uint32) >> (tl.arange(0, PER_BYTE) * CODE_BITS)[None, None, :].to(tl.uint32)
    codes = tl.reshape(codes, (BLOCK_M, UNITS))

    # Selectors: of 16 bits 0x10 for the first value and 0x32 for the second, of 8 bits 0 and 1; for zero 0x44 and 4.
    SELECTOR_BITS: tl.constexpr = WIDTH // 2
    if SELECTOR_BITS * GROUP > 32:
        codes = codes.to(tl.uint64)
    ZEROS: tl.constexpr = 0x4444444444444444 if SELECTOR_BITS * GROUP > 32 else 0x44444444
    FIRST: tl.constexpr = 0x54 if WIDTH == 16 else 4
    SECOND: tl.constexpr = 0x76 if WIDTH == 16 else 5
    MASK: tl.constexpr = (1 << BITS) - 1
    selectors = codes * 0 + ZEROS
    selectors ^= (codes * 0 + FIRST) << ((codes & MASK) * SELECTOR_BITS)
    if TAKEN == 2:
        selectors ^= (codes * 0 + SECOND) << (((codes >> BITS) & MASK) * SELECTOR_BITS)
    WORDS: tl.constexpr = GROUP * WIDTH // 32
    words = (tl.arange(0, WORDS) * 16)[None, None, :].to(selectors.dtype)
    chosen = (selectors[:, :, None] >> words).to(tl.uint32)  # [BLOCK_M, UNITS, WORDS]
    dense = permute_bytes(tl.broadcast_to(values[:, :, None], (BLOCK_M, UNITS, WORDS)), chosen)
    if PAIRS == 2:
        pairs = tl.permute(tl.reshape(dense, (BLOCK_M, GROUPS, 2, WORDS)), (0, 1, 3, 2))
        even, odd = tl.split(pairs)
        dense = even | odd
    return _elements(dense, values_ptr.dtype.element_ty, BLOCK_M, BLOCK_K)


@triton.jit
def permute_bytes(values, selectors):
    """Of each uint32 the bytes that its selector names, 4 bits for each of the result: 0 to 3 a byte, 4 to 7 zero. One
    instruction, which the interpreter takes apart."""
    if INTERPRETED:
        result = values * 0
        for i in tl.static_range(4):
            selector = (selectors >> (4 * i)) & 7
            byte = (values >> ((selector & 3) * 8)) & 255
            result |= tl.where(selector < 4, byte, 0).to(tl.uint32) << (8 * i)
        return result
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [values, selectors], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def _load_by_shifting(
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
    """``load_nm_tile`` for any pattern and dtype, slot by slot: its value is shifted to its place in a register of 4, 2
    elements or one, and goes into the register of the group that its position names."""
    WIDTH: tl.constexpr = values_ptr.dtype.element_ty.primitive_bitwidth
    IN_WORD: tl.constexpr = 32 // WIDTH
    # Groups that are smaller than a register are taken together.
    SPAN: tl.constexpr = GROUP if GROUP > IN_WORD else IN_WORD
    SPANS: tl.constexpr = BLOCK_K // SPAN
    WORDS: tl.constexpr = SPAN // IN_WORD
    SLOTS: tl.constexpr = SPAN // GROUP * KEEP
    if WIDTH == 32:
        bits_ptr = values_ptr.to(tl.pointer_type(tl.uint32))
    elif WIDTH == 16:
        bits_ptr = values_ptr.to(tl.pointer_type(tl.uint16))
    else:
        bits_ptr = values_ptr.to(tl.pointer_type(tl.uint8))
    spans = first_column // SPAN + tl.arange(0, SPANS)
    words = tl.arange(0, WORDS)[None, None, :]
    dense = tl.zeros((BLOCK_M, SPANS, WORDS), dtype=tl.uint32)
    for slot in tl.static_range(SLOTS):
        columns = spans * SLOTS + slot
        mask = row_mask[:, None] & (columns < kept)[None, :]
        values = tl.load(bits_ptr + rows[:, None].to(tl.int64) * kept + columns[None, :], mask=mask, other=0)
        bits = columns * BITS
        packed = tl.load(positions_ptr + rows[:, None] * position_bytes + (bits // 8)[None, :], mask=mask, other=0)
        places = ((packed.to(tl.int32) >> (bits % 8)[None, :]) & ((1 << BITS) - 1)) + slot // KEEP * GROUP
        shifted = values.to(tl.uint32) << (places % IN_WORD * WIDTH).to(tl.uint32)
        dense |= tl.where((places // IN_WORD)[:, :, None] == words, shifted[:, :, None], 0)
    return _elements(dense, values_ptr.dtype.element_ty, BLOCK_M, BLOCK_K)


@triton.jit
def _elements(words, ELEMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The 4, 2 elements or one of each uint32, in order: [BLOCK_M, ., .] -> [BLOCK_M, BLOCK_K]."""
    if ELEMENT.primitive_bitwidth == 32:
        return tl.reshape(words, (BLOCK_M, BLOCK_K)).to(ELEMENT, bitcast=True)
    elif ELEMENT.primitive_bitwidth == 16:
        low, high = words.to(tl.uint16), (words >> 16).to(tl.uint16)
        pairs = tl.join(low.to(ELEMENT, bitcast=True), high.to(ELEMENT, bitcast=True))
        return tl.reshape(pairs, (BLOCK_M, BLOCK_K))
    else:
        even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
        odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
        return tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_K))


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
