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

The packed values may also be int8, -127 to 127, when a quantized weight is stored in this pattern (see ``int8``).

With column compaction a third tensor says which inputs the weight reads, and ``in`` above counts those alone:

- ``columns int32 (kept)``: the input columns that are kept, strictly ascending. Every column with a non-zero is among
  them; where there are fewer such columns than ``kept``, the lowest all-zero columns fill up.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparsebert.configs import NMConfig
from sparsebert.formats.common import (
    DTYPES,
    check_count,
    check_indices,
    check_matrix,
    check_one_device,
    check_tensor,
    fill_up,
    largest,
    largest_in_groups,
    pack_bits,
    refuse_minus_128,
    refuse_non_finite,
    refuse_spare_elsewhere,
    squared_norms,
    unpack_bits,
    whole_below,
)

# What packed values may be; DTYPES are those of a weight that can be projected.
VALUE_DTYPES = (*DTYPES, torch.int8)

# Kept columns come in multiples of this where there are enough: a tile of the kernels, and 64 bytes of fp16.
_COLUMN_UNIT = 32

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
    groups = _grouped(weight, n, m, "weight", DTYPES)
    return largest_in_groups(groups.abs().flatten(1), n, m)


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

    ``name`` is the layer's path, for the error a weight with NaN, infinities, an int8 -128 or too full a group is
    refused with.
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
        values[block] = torch.where(kept == 0, kept.new_zeros(()), kept).flatten(1)
        positions[block] = pack_bits(slots.flatten(1), position_bits(m))
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
    slots = unpack_bits(positions, position_bits(m), kept).long().view(out_features, in_features // m, n)
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

    Checked: shapes, dtypes, one device, finite values (int8: no -128), positions in range and strictly ascending in
    each group, spare slots +0.0 at the lowest free positions, spare bits zero. What passes cannot make a kernel read
    out of bounds.
    """
    expected_values, expected_positions = packed_shapes(n, m, out_features, in_features)
    why = f" for in_features={in_features} at {n}:{m}"
    check_tensor(values, expected_values, VALUE_DTYPES, f"{name}: values", why)
    check_tensor(positions, expected_positions, (torch.uint8,), f"{name}: positions", why)
    check_one_device(name, values=values, positions=positions)
    if values.is_meta or not values.numel():
        return
    bits, kept = position_bits(m), expected_values[1]
    rows = max(1, _BLOCK // in_features)
    for start in range(0, out_features, rows):
        block = slice(start, start + rows)
        part, packed = values[block], positions[block]
        _refuse_values(part, f"{name}: values", start)
        slots = unpack_bits(packed, bits, kept)
        if not torch.equal(pack_bits(slots, bits), packed):
            row = start + _first((pack_bits(slots, bits) != packed).any(-1))
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


def column_count(in_features: int, fraction: float, m: int) -> int:
    """How many of ``in_features`` columns to keep for ``fraction`` (above 0, at most 1) of them: a multiple of m.

    The largest multiple of max(m, 32) that is not above ``fraction * in_features``; where that would be 0, the largest
    multiple of m that is not above it, and at least m. ``ValueError`` for another fraction, and where not even m
    columns are there.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"column_count: fraction is {fraction}, expected above 0 and at most 1")
    if m < 1 or in_features < m:
        raise ValueError(f"column_count: in_features is {in_features}, expected at least m = {m} >= 1")
    wanted = whole_below(fraction * in_features)
    unit = max(m, _COLUMN_UNIT)
    return wanted // unit * unit or max(wanted // m * m, m)


def choose_columns(weight: Tensor, count: int) -> Tensor:
    """int32 ``(count,)``, strictly ascending: the columns of ``weight (out, in)`` with the largest squared norms.

    Norms are computed in float32, of a float64 weight in float64; ties go to the lower index.
    """
    check_matrix(weight, VALUE_DTYPES, "choose_columns")
    check_count(count, weight.shape[1], "choose_columns: count")
    return largest(squared_norms(weight, 0), count)


def kept_columns(weight: Tensor, count: int, *, name: str = "weight") -> Tensor:
    """int32 ``(count,)``, ascending: the columns of a pruned ``weight (out, in)`` to pack.

    All columns with a non-zero, filled up with the lowest all-zero columns. ``ValueError`` naming the layer if more
    than ``count`` columns have a non-zero.
    """
    check_matrix(weight, VALUE_DTYPES, name)
    check_count(count, weight.shape[1], f"{name}: count of columns")
    if weight.is_meta:
        return torch.empty(count, dtype=torch.int32, device=weight.device)
    used = (weight != 0).any(0)
    if (found := int(used.sum())) > count:
        raise ValueError(f"{name}: weight has {found} columns with a non-zero, expected at most {count}")
    return fill_up(used, count)


def expand_columns(weight: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """``weight (out, kept)`` of the kept ``columns`` -> ``(out, in_features)``, +0.0 everywhere else.

    Trusts its input (see ``validate_columns``) except for shapes.
    """
    check_matrix(weight, VALUE_DTYPES, "expand_columns")
    check_count(weight.shape[1], in_features, "expand_columns: count of columns")
    check_tensor(columns, (weight.shape[1],), (torch.int32,), "expand_columns: columns")
    dense = weight.new_zeros(weight.shape[0], in_features)
    return dense.index_copy_(1, columns.long(), weight.detach())


def validate_columns(
    columns: Tensor, count: int, in_features: int, *, name: str = "nm", weight: Tensor | None = None
) -> None:
    """``ValueError`` naming ``name``, expected and actual unless ``columns`` can index ``in_features`` inputs.

    Checked: int32 ``(count,)``, strictly ascending, 0 to ``in_features`` - 1. With ``weight (out, count)``, the
    unpacked weight of those columns, also that the all-zero ones are the lowest, as ``kept_columns`` fills up: then
    the packed form is the only one of its weight.
    """
    check_indices(columns, count, in_features, f"{name}: columns")
    if weight is None:
        return
    if weight.dim() != 2 or weight.shape[1] != count:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}, expected (out_features, {count})")
    check_one_device(name, columns=columns, weight=weight)
    if not columns.is_meta:
        refuse_spare_elsewhere(columns, (weight != 0).any(0), f"{name}: columns")


def _grouped(weight: Tensor, n: int, m: int, name: str, dtypes: tuple[torch.dtype, ...] = VALUE_DTYPES) -> Tensor:
    """``(out, in) -> (out, in/m, m)`` after the checks every entry point needs."""
    NMConfig(n, m)
    check_matrix(weight, dtypes, name)
    if weight.shape[1] % m:
        raise ValueError(f"{name}: in_features is {weight.shape[1]}, not divisible by {m} as {n}:{m} needs")
    return weight.detach().reshape(weight.shape[0], weight.shape[1] // m, m)


def _refuse(groups: Tensor, n: int, m: int, name: str, first_row: int) -> None:
    _refuse_values(groups, f"{name}: weight", first_row)
    counts = (groups != 0).sum(-1, dtype=torch.int32)
    if counts.numel() and int(counts.max()) > n:
        row, group = (int(i) for i in (counts > n).nonzero()[0])
        raise ValueError(
            f"{name}: weight does not obey {n}:{m}: row {first_row + row}, columns {group * m} to {group * m + m - 1} "
            f"hold {int(counts[row, group])} non-zeros, expected at most {n}"
        )


def _refuse_values(tensor: Tensor, label: str, first_row: int) -> None:
    if tensor.dtype == torch.int8:
        refuse_minus_128(tensor, label, first_row)
    else:
        refuse_non_finite(tensor, label, first_row)


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
