"""The n:m format: of every m consecutive weights along ``in_features``, at most n are non-zero.

For a weight ``(out, in)`` with ``in`` divisible by m the packed form is two row-major tensors:

- ``values (out, in*n/m)``, float: the kept weights, n a group, in the order of their positions;
- ``positions uint8 (out, ceil(in*n/m * b / 8))``: the place of each kept weight inside its group, b bits each
  (b = 2 for m <= 4, else 4), little-endian within a byte; a row ends at a byte, its spare bits are zero.

Exactly n slots are stored for every group. A group with fewer non-zeros fills its spare slots with +0.0 at the lowest
free positions; positions of a group strictly ascend. So a weight has one packed form only, an empty 2:4 group reads
positions 0, 1 (nibble 0100), and a 2:4 weight in 16-bit costs 8 + 1 = 9 bits a weight.

-0.0 counts as zero (and unpacks as +0.0); NaN and infinities are refused. All functions also take meta tensors, where
they compute shapes alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparsebert.configs import NMConfig

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Rows are handled in blocks of about this many weights, so that the index tensors of a big matrix stay in cache.
_BLOCK = 1 << 20


def position_bits(m: int) -> int:
    """Bits a position takes: 2 for m <= 4, 4 up to 16."""
    return 2 if m <= 4 else 4


def packed_shapes(n: int, m: int, out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of ``values`` and ``positions``; ``ValueError`` where ``in_features`` is not a multiple of m."""
    NMConfig(n, m)
    if in_features % m:
        raise ValueError(f"{n}:{m} needs in_features divisible by {m}, got {in_features}")
    kept = in_features // m * n
    return (out_features, kept), (out_features, -(-kept * position_bits(m) // 8))


def magnitude_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """``True`` at the n largest |w| of every group of m; ties go to the lower position, so masks are reproducible."""
    groups = _grouped(weight, n, m, "weight").abs()
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :n]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=weight.device)
    return mask.scatter_(-1, order, True).view(weight.shape)


def project(weight: Tensor, n: int, m: int) -> Tensor:
    """The nearest weight (Frobenius) that obeys n:m: all but the n largest |w| of each group become 0."""
    return torch.where(magnitude_mask(weight, n, m), weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def find_violation(weight: Tensor, n: int, m: int) -> tuple[int, int, int] | None:
    """``(row, first column, non-zeros)`` of the first group with more than n non-zeros, or None."""
    counts = (_grouped(weight, n, m, "weight") != 0).sum(-1)
    bad = (counts > n).nonzero()
    if not len(bad):
        return None
    row, group = (int(i) for i in bad[0])
    return row, group * m, int(counts[row, group])


def pack(weight: Tensor, n: int, m: int, *, name: str = "weight") -> tuple[Tensor, Tensor]:
    """``weight (out, in)`` that obeys n:m -> ``(values, positions)``; ``unpack`` gives it back exactly.

    ``name`` is the layer's path, for the error a weight with NaN, infinities or too full a group is refused with.
    """
    groups = _grouped(weight, n, m, name)
    out_features, in_features = weight.shape
    values_shape, positions_shape = packed_shapes(n, m, out_features, in_features)
    values = torch.empty(values_shape, dtype=weight.dtype, device=weight.device)
    positions = torch.empty(positions_shape, dtype=torch.uint8, device=weight.device)
    if weight.is_meta or not weight.numel():
        return values, positions
    rows = max(1, _BLOCK // in_features)
    for start in range(0, out_features, rows):
        block = slice(start, start + rows)
        part = groups[block]
        _refuse(part, n, m, name, start)
        slots = _slots(part, n, m)
        kept = part.gather(-1, slots.long())
        values[block] = torch.where(kept == 0, 0.0, kept).flatten(1)
        positions[block] = _pack_bits(slots.flatten(1), position_bits(m))
    return values, positions


def unpack(values: Tensor, positions: Tensor, n: int, m: int, in_features: int) -> Tensor:
    """``(values, positions)`` -> the dense weight ``(out, in_features)``, dropped places +0.0.

    Trusts its input (see ``validate``) except for shapes.
    """
    out_features = values.shape[0]
    expected = packed_shapes(n, m, out_features, in_features)
    if (tuple(values.shape), tuple(positions.shape)) != expected:
        raise ValueError(
            f"unpack: values {tuple(values.shape)} and positions {tuple(positions.shape)}, expected {expected[0]} and "
            f"{expected[1]} for in_features={in_features} at {n}:{m}"
        )
    if values.is_meta:
        return torch.empty(out_features, in_features, dtype=values.dtype, device=values.device)
    kept = values.shape[1]
    slots = _unpack_bits(positions, position_bits(m), kept).long().view(out_features, in_features // m, n)
    dense = torch.zeros(out_features, in_features // m, m, dtype=values.dtype, device=values.device)
    return dense.scatter_(-1, slots, values.reshape(slots.shape)).view(out_features, in_features)


def validate(
    values: Tensor,
    positions: Tensor,
    n: int,
    m: int,
    out_features: int,
    in_features: int,
    *,
    name: str = "nm",
) -> None:
    """``ValueError`` naming ``name``, the tensor, expected and actual unless this is the packed form of some weight.

    Checked: shapes, dtypes, one device, finite values, positions in range and strictly ascending in each group, spare
    slots +0.0 at the lowest free positions, spare bits zero. What passes cannot make a kernel read out of bounds.
    """
    expected_values, expected_positions = packed_shapes(n, m, out_features, in_features)
    for tensor, label, shape, dtypes in (
        (values, "values", expected_values, DTYPES),
        (positions, "positions", expected_positions, (torch.uint8,)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: {label} has shape {tuple(tensor.shape)}, expected {shape} for "
                f"in_features={in_features} at {n}:{m}"
            )
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ValueError(f"{name}: {label} is {str(tensor.dtype).removeprefix('torch.')}, expected {allowed}")
    if values.device != positions.device:
        raise ValueError(f"{name}: values is on {values.device}, positions on {positions.device}, expected one device")
    if values.is_meta or not values.numel():
        return
    bits, kept = position_bits(m), expected_values[1]
    rows = max(1, _BLOCK // in_features)
    for start in range(0, out_features, rows):
        block = slice(start, start + rows)
        part, packed = values[block], positions[block]
        _refuse_non_finite(part, f"{name}: values", start)
        slots = _unpack_bits(packed, bits, kept)
        if not torch.equal(_pack_bits(slots, bits), packed):
            row = start + _first((_pack_bits(slots, bits) != packed).any(-1))
            raise ValueError(f"{name}: positions has spare bits set at the end of row {row}, expected zeros")
        groups = slots.view(slots.shape[0], in_features // m, n)
        if bad := (slots >= m).any(-1).nonzero().flatten()[:1].tolist():
            row = start + bad[0]
            raise ValueError(f"{name}: positions has {int(slots[bad[0]].max())} in row {row}, expected 0 to {m - 1}")
        ascending = (groups[..., 1:] > groups[..., :-1]).all(-1)
        if not ascending.all():
            row, group = ascending.logical_not().nonzero()[0].tolist()
            raise ValueError(
                f"{name}: positions {groups[row, group].tolist()} of row {start + row}, group {group} do not strictly "
                f"ascend"
            )
        if torch.signbit(part[part == 0]).any():
            raise ValueError(f"{name}: values holds -0.0, expected +0.0 in spare slots")
        filled = torch.zeros(slots.shape[0], in_features // m, m, dtype=torch.bool, device=values.device)
        filled.scatter_(-1, groups.long(), (part != 0).view(groups.shape))
        if not torch.equal(_slots(filled, n, m), groups):
            row, group = (_slots(filled, n, m) != groups).any(-1).nonzero()[0].tolist()
            raise ValueError(
                f"{name}: spare slots of row {start + row}, group {group} are not at the lowest free positions"
            )


def _grouped(weight: Tensor, n: int, m: int, name: str) -> Tensor:
    """``(out, in) -> (out, in/m, m)`` after the checks every entry point needs."""
    NMConfig(n, m)
    if weight.dim() != 2:
        raise ValueError(f"{name}: weight has {weight.dim()} dimensions, expected 2 (out_features, in_features)")
    if weight.dtype not in DTYPES:
        raise TypeError(f"{name}: weight is {weight.dtype}, expected a floating-point tensor of 16, 32 or 64 bits")
    if weight.shape[1] % m:
        raise ValueError(f"{name}: in_features is {weight.shape[1]}, not divisible by {m} as {n}:{m} needs")
    return weight.detach().reshape(weight.shape[0], weight.shape[1] // m, m)


def _refuse(groups: Tensor, n: int, m: int, name: str, first_row: int) -> None:
    _refuse_non_finite(groups, f"{name}: weight", first_row)
    counts = (groups != 0).sum(-1, dtype=torch.int32)
    if counts.numel() and int(counts.max()) > n:
        row, group = (int(i) for i in (counts > n).nonzero()[0])
        raise ValueError(
            f"{name}: weight does not obey {n}:{m}: row {first_row + row}, columns {group * m} to {group * m + m - 1} "
            f"hold {int(counts[row, group])} non-zeros, expected at most {n}"
        )


def _refuse_non_finite(tensor: Tensor, label: str, first_row: int) -> None:
    finite = torch.isfinite(tensor)
    if not finite.all():
        where = finite.logical_not().nonzero()[0].tolist()
        value = float(tensor[tuple(where)])
        raise ValueError(f"{label} holds {value} in row {first_row + where[0]}, expected finite numbers")


def _first(flags: Tensor) -> int:
    return int(flags.nonzero()[0, 0])


def _slots(groups: Tensor, n: int, m: int) -> Tensor:
    """Positions ``uint8 (..., n)`` to store for each group ``(..., m)``: its non-zeros, then the lowest free places."""
    powers = torch.tensor([1 << i for i in range(m)], dtype=torch.int32, device=groups.device)
    pattern = torch.where(groups != 0, powers, powers.new_zeros(())).sum(-1, dtype=torch.int32)
    return _slot_table(n, m).to(groups.device)[pattern]


@lru_cache(maxsize=64)
def _slot_table(n: int, m: int) -> Tensor:
    """Row p holds the n positions for a group whose non-zeros are the set bits of p (p has at most n of them)."""
    patterns = torch.arange(1 << m, dtype=torch.int32)
    bits = (patterns[:, None] >> torch.arange(m, dtype=torch.int32)) & 1
    # Non-zeros rank before free places and lower places before higher: the first n by this key are the stored ones.
    order = torch.sort(bits, dim=-1, descending=True, stable=True).indices[:, :n]
    return torch.sort(order, dim=-1).values.to(torch.uint8)


def _pack_bits(slots: Tensor, bits: int) -> Tensor:
    """``uint8 (rows, k)`` of small numbers -> ``uint8 (rows, ceil(k*bits/8))``, little-endian within a byte."""
    per_byte = 8 // bits
    rows, k = slots.shape
    if spare := -k % per_byte:
        slots = torch.nn.functional.pad(slots, (0, spare))
    parts = slots.reshape(rows, -(-k // per_byte), per_byte)
    packed = parts[..., 0].clone()
    for i in range(1, per_byte):
        packed |= parts[..., i] << (bits * i)
    return packed


def _unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of ``_pack_bits``: the first ``count`` numbers of each row, ``uint8 (rows, count)``."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    numbers = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return numbers.flatten(1)[:, :count]
