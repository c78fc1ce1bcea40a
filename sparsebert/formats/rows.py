"""The rows format: whole rows of a weight are kept, all others are zero.

For a weight ``(out, in)`` of which ``k`` rows are kept the packed form is two row-major tensors:

- ``rows int32 (k)``: the output rows that are kept, strictly ascending;
- ``values (k, in)``, float: these rows.

Every row with a non-zero is among the kept. Where there are fewer such rows than k, the lowest all-zero rows fill up,
so a weight has one packed form only for each k. ``y = x Wᵀ`` is a small dense product whose outputs are scattered.

-0.0 counts as zero (and unpacks as +0.0); NaN and infinities are refused. All functions but ``split`` also take meta
tensors, where they compute shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sparsebert.formats.common import (
    DTYPES,
    check_count,
    check_indices,
    check_matrix,
    check_one_device,
    check_tensor,
    fill_up,
    largest,
    refuse_non_finite,
    refuse_spare_elsewhere,
    squared_norms,
)


def row_count(ratio: float, out_features: int) -> int:
    """``round(ratio * out_features)``: how many rows to keep for ``ratio``, from 0 to 1, of the parameters.

    Half a row rounds to even. ``ValueError`` for another ratio.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"row_count: ratio is {ratio}, expected 0 to 1")
    return min(round(ratio * out_features), out_features)


def magnitude_rows(weight: Tensor, count: int) -> Tensor:
    """int32 ``(count,)``, strictly ascending: the rows of ``weight (out, in)`` with the largest squared norms.

    Norms are computed in float32, of a float64 weight in float64; ties go to the lower index.
    """
    check_matrix(weight, DTYPES, "magnitude_rows")
    check_count(count, weight.shape[0], "magnitude_rows: count")
    return largest(squared_norms(weight, 1), count)


def project(weight: Tensor, count: int) -> Tensor:
    """The nearest weight (Frobenius) with ``count`` non-zero rows at most: all other rows become 0."""
    mask = torch.zeros(weight.shape[0], 1, dtype=torch.bool, device=weight.device)
    mask.index_fill_(0, magnitude_rows(weight, count).long(), True)
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def pack(weight: Tensor, count: int, *, name: str = "weight") -> tuple[Tensor, Tensor]:
    """``weight (out, in)`` with at most ``count`` non-zero rows -> ``(rows, values)``; ``unpack`` gives it back.

    ``name`` is the layer's path, for the error a weight with NaN, infinities or too many rows is refused with.
    """
    check_matrix(weight, DTYPES, name)
    check_count(count, weight.shape[0], f"{name}: count of rows")
    weight = weight.detach()
    if weight.is_meta:
        rows = torch.empty(count, dtype=torch.int32, device=weight.device)
        return rows, weight.new_empty(count, weight.shape[1])
    refuse_non_finite(weight, f"{name}: weight")
    used = (weight != 0).any(1)
    if (found := int(used.sum())) > count:
        raise ValueError(f"{name}: weight has {found} rows with a non-zero, expected at most {count}")
    rows = fill_up(used, count)
    values = weight.index_select(0, rows.long())
    return rows, torch.where(values == 0, values.new_zeros(()), values)


def unpack(rows: Tensor, values: Tensor, out_features: int) -> Tensor:
    """``(rows, values)`` -> the dense weight ``(out_features, in)``, all other rows +0.0.

    Trusts its input (see ``validate``) except for shapes.
    """
    if values.dim() != 2 or tuple(rows.shape) != tuple(values.shape[:1]) or len(rows) > out_features:
        raise ValueError(
            f"unpack: rows {tuple(rows.shape)} and values {tuple(values.shape)}, expected (k,) and (k, in_features) "
            f"with k at most out_features={out_features}"
        )
    dense = values.new_zeros(out_features, values.shape[1])
    return dense.index_copy_(0, rows.long(), values.detach())


def stack(parts: Sequence[tuple[Tensor, Tensor]], out_features: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Packed forms of weights of ``out_features`` rows each as that of these weights, one under the other.

    Each part keeps the rows that filled it up, so ``split`` gives the parts back; one weight of all rows would have had
    its own lowest.
    """
    firsts = accumulate(out_features, initial=0)
    rows = [rows + first for (rows, _), first in zip(parts, firsts, strict=False)]
    return torch.cat(rows), torch.cat([values for _, values in parts])


def split(rows: Tensor, values: Tensor, out_features: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The packed forms of the next ``out_features`` rows each, all together those of the weight; new tensors."""
    bounds = list(accumulate(out_features, initial=0))
    places = torch.searchsorted(rows, torch.tensor(bounds, dtype=rows.dtype, device=rows.device)).tolist()
    return [
        (rows[begin:end] - first, values[begin:end].clone())
        for first, (begin, end) in zip(bounds, pairwise(places), strict=False)
    ]


def validate(
    rows: Tensor,
    values: Tensor,
    count: int,
    out_features: int,
    in_features: int,
    *,
    parts: int = 1,
    name: str = "rows",
) -> None:
    """``ValueError`` naming ``name``, the tensor, expected and actual unless this is the packed form of some weight.

    Checked: shapes, dtypes, one device, rows strictly ascending and in range, finite values, no -0.0, all-zero rows
    the lowest that are free, in each of ``parts`` of one size. What passes cannot make a kernel write out of bounds.
    """
    check_indices(rows, count, out_features, f"{name}: rows")
    check_tensor(values, (count, in_features), DTYPES, f"{name}: values", f" for {count} rows")
    check_one_device(name, rows=rows, values=values)
    if rows.is_meta:
        return
    refuse_non_finite(values, f"{name}: values")
    zero = values == 0
    if len(bad := (zero & torch.signbit(values)).nonzero()):
        raise ValueError(f"{name}: values holds -0.0 in row {int(bad[0, 0])}, expected +0.0")
    used, size = zero.logical_not().any(1), out_features // parts
    for first in range(0, size * parts, max(1, size)):
        own = (rows >= first) & (rows < first + size)
        refuse_spare_elsewhere(rows[own] - first, used[own], f"{name}: rows")
