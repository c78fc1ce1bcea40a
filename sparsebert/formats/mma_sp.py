"""2:4 weights in the order in which the lanes of a warp hold them for ``mma.sp``, from the neutral n:m form and back.

A pattern of 2:4, 1:4 or 1:2 is a 2:4 pattern too: each group of four inputs has two slots. The weight is cut into
blocks of 64 features by 128 bytes of a row of x (64 inputs of 16 bits, 128 of int8), padded with zeros where it ends
within one. A block is two steps along the inputs of four products of 16 features each (``m16n8k32``, for int8
``m16n8k64``), and in the order of memory

- ``values``: ``[step 2][product 4][lane 32][16 bytes]``: the four registers of a lane; of lane 4g + q, register r holds
  row g + 8 (r mod 2) of the product, and of the kept weights of the step those from (r div 2) 16 + 4q bytes on;
- ``metadata`` int32, two bits for each slot, its place in the group, lower inputs in lower bits. 16 bits: ``[lane
  32][product 4]``, the word of lane 4g + q has inputs 16q to 16q + 15 of the block, row g in its low half and row g + 8
  in the high: q of 0 and 1 serves the first step, 2 and 3 the second. int8: ``[step 2][lane 32][product 4]``, the word
  has inputs 32 (q div 2) to 32 (q div 2) + 31 of the step, row g + 8 (q mod 2).

So a lane's part of a product is one load of 16 bytes, coalesced over the warp, and so is the metadata of all four
products. The places of a group ascend strictly, as ``.sp::ordered_metadata`` has it; an empty group reads 0, 1. Source
of the fragments: PTX ISA 9.0, "Matrix fragments for sparse mma.m16n8k32" and "for sparse mma.m16n8k64".

Only integers and copies of values: the same bits on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebert.formats.common import pack_bits, unpack_bits

PATTERNS = ((2, 4), (1, 4), (1, 2))
BLOCK_FEATURES = 64
BLOCK_BYTES = 128
_LANES = 32
_PRODUCTS = 4  # of 16 features in a block
_STEPS = 2  # along the inputs of a block


def block_inputs(itemsize: int) -> int:
    """Inputs of a block, of elements of ``itemsize`` bytes."""
    return BLOCK_BYTES // itemsize


def packed_shapes(out_features: int, in_features: int, itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``values`` and ``metadata``: ``(feature blocks, input blocks, elements)``.

    ``ValueError`` where ``in_features`` is not a multiple of 4.
    """
    if in_features % 4:
        raise ValueError(f"mma_sp: in_features is {in_features}, expected a multiple of 4")
    blocks = (-(-out_features // BLOCK_FEATURES), -(-in_features // block_inputs(itemsize)))
    kept = BLOCK_FEATURES * block_inputs(itemsize) // 2
    return (*blocks, kept), (*blocks, kept // 16)


def pack(values: Tensor, positions: Tensor, n: int, m: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Neutral ``values (out, in n / m)`` (16 bits or int8) and ``positions`` at n:m -> ``(values, metadata)``.

    ``ValueError`` for another pattern than 2:4, 1:4 and 1:2.
    """
    places = unpack_bits(positions, 2, values.shape[1])
    values, places = _two_slots(values, places, n, m)
    itemsize = values.element_size()
    shape, metadata_shape = packed_shapes(values.shape[0], in_features, itemsize)
    rows, kept = shape[0] * BLOCK_FEATURES, shape[1] * block_inputs(itemsize) // 2
    places = _padded(places, rows, kept)
    # Groups that padding adds read 0, 1.
    places[:, values.shape[1] + 1 :: 2] = 1
    places[values.shape[0] :, 1::2] = 1
    by_lane = _to_lanes(_padded(values, rows, kept), shape).reshape(shape)
    # A place has two bits, so four of them are a byte and sixteen a word.
    return by_lane, _metadata_to_lanes(pack_bits(places, 2), metadata_shape, itemsize)


def unpack(values: Tensor, metadata: Tensor, n: int, m: int, out_features: int, in_features: int) -> list[Tensor]:
    """Inverse of ``pack``: the neutral ``values`` and ``positions``, bit for bit."""
    kept = in_features // 2
    places = unpack_bits(_metadata_from_lanes(metadata, values.element_size()), 2, values.shape[1] * _row_kept(values))
    compressed = _from_lanes(values)[:out_features, :kept]
    values, places = _one_pattern(compressed, places[:out_features, :kept], n, m)
    return [values.contiguous(), pack_bits(places, 2)]


# Slots


def _two_slots(values: Tensor, places: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Values and places of the weight as 2:4, two slots for each four inputs."""
    if (n, m) == (2, 4):
        return values, places
    if (n, m) == (1, 2):
        # Two groups of two inputs are one of four, whose second half begins at 2.
        places = places.clone()
        places[:, 1::2] += 2
        return values, places
    if (n, m) != (1, 4):
        raise ValueError(f"mma_sp: the pattern is {n}:{m}, expected one of 2:4, 1:4, 1:2")
    # The spare slot is the lowest free place: 1 behind a weight at 0, else 0 before it.
    first = places == 0
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    slots = torch.stack((torch.where(first, values, zero), torch.where(first, zero, values)), -1)
    two = torch.stack((torch.zeros_like(places), torch.where(first, torch.ones_like(places), places)), -1)
    return slots.flatten(1), two.flatten(1)


def _one_pattern(values: Tensor, places: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Inverse of ``_two_slots``."""
    if (n, m) == (2, 4):
        return values, places
    if (n, m) == (1, 2):
        places = places.clone()
        places[:, 1::2] -= 2
        return values, places
    slots, two = values.unflatten(1, (-1, 2)), places.unflatten(1, (-1, 2))
    second = slots[..., 1] != 0
    return torch.where(second, slots[..., 1], slots[..., 0]), torch.where(second, two[..., 1], two[..., 0])


# The order of lanes. Axes: feature block, product, half of 8 rows, g; input block, step, half of 32 bytes, q, element.


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    out, kept = matrix.shape
    return torch.nn.functional.pad(matrix, (0, columns - kept, 0, rows - out))


def _row_kept(values: Tensor) -> int:
    """Kept weights of a block's row."""
    return values.shape[2] // BLOCK_FEATURES


def _to_lanes(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    per_register = 4 // matrix.element_size()
    axes = matrix.view(shape[0], _PRODUCTS, 2, 8, shape[1], _STEPS, 2, 4, per_register)
    return axes.permute(0, 4, 5, 1, 3, 7, 6, 2, 8)


def _from_lanes(values: Tensor) -> Tensor:
    per_register = 4 // values.element_size()
    axes = values.view(*values.shape[:2], _STEPS, _PRODUCTS, 8, 4, 2, 2, per_register)
    return axes.permute(0, 3, 7, 4, 1, 2, 6, 5, 8).reshape(values.shape[0] * BLOCK_FEATURES, -1)


def _metadata_to_lanes(packed: Tensor, shape: tuple[int, ...], itemsize: int) -> Tensor:
    """``packed uint8``: four places a byte, a row of the weight after the other."""
    blocks = shape[:2]
    if itemsize == 2:
        # Axes of the word: half of 8 rows, two bytes.
        axes = packed.view(blocks[0], _PRODUCTS, 2, 8, blocks[1], 4, 2)
        ordered = axes.permute(0, 4, 3, 5, 1, 2, 6)
    else:
        # Four bytes; which half of 8 rows is in the lane.
        axes = packed.view(blocks[0], _PRODUCTS, 2, 8, blocks[1], _STEPS, 2, 4)
        ordered = axes.permute(0, 4, 5, 3, 6, 2, 1, 7)
    return ordered.reshape(*blocks, -1).view(torch.int32)


def _metadata_from_lanes(metadata: Tensor, itemsize: int) -> Tensor:
    blocks = metadata.shape[:2]
    packed = metadata.view(torch.uint8)
    if itemsize == 2:
        axes = packed.view(*blocks, 8, 4, _PRODUCTS, 2, 2)
        ordered = axes.permute(0, 4, 5, 2, 1, 3, 6)
    else:
        axes = packed.view(*blocks, _STEPS, 8, 2, 2, _PRODUCTS, 4)
        ordered = axes.permute(0, 6, 5, 3, 1, 2, 4, 7)
    return ordered.reshape(blocks[0] * BLOCK_FEATURES, -1)


# The dense factor of a low-rank part


def pack_factor(u: Tensor) -> Tensor:
    """``u (out, rank)``, 16 bits, rank a multiple of 16 -> ``(feature blocks, rank / 16, 1024)`` in the order of the
    dense product ``m16n8k16``, whose left fragment is that of ``values`` above: ``[product 4][lane 32][16 bytes]``."""
    out, rank = u.shape
    if rank % 16:
        raise ValueError(f"mma_sp: rank is {rank}, expected a multiple of 16")
    blocks = -(-out // BLOCK_FEATURES)
    axes = _padded(u, blocks * BLOCK_FEATURES, rank).view(blocks, _PRODUCTS, 2, 8, rank // 16, 2, 4, 2)
    return axes.permute(0, 4, 1, 3, 6, 5, 2, 7).reshape(blocks, rank // 16, 1024)


def unpack_factor(packed: Tensor, out_features: int) -> Tensor:
    """Inverse of ``pack_factor``."""
    blocks, steps, _ = packed.shape
    axes = packed.view(blocks, steps, _PRODUCTS, 8, 4, 2, 2, 2).permute(0, 2, 6, 3, 1, 5, 4, 7)
    return axes.reshape(blocks * BLOCK_FEATURES, steps * 16)[:out_features].contiguous()
