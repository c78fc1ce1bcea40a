"""From scores to masks: exactly so many of the largest, at each granularity.

Every function keeps an exact count, ties going to the lower (row-major) index, so that masks are reproducible and equal
on every rank. Scores may have any sign. NaN counts as the largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# One entry in so many is looked at to guess where the k-th largest lies, where there are at least _SMALL entries.
_STRIDE = 127
_SMALL = 1 << 18


def largest(scores: Tensor, count: int) -> Tensor:
    """``True`` at the ``count`` largest entries of a tensor of any shape."""
    return _largest([scores.flatten()], count)[0].view(scores.shape)


def largest_overall(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """``True`` at the ``count`` largest entries of all tensors together; ties go to the earlier tensor."""
    masks = _largest([part.flatten() for part in scores.values()], count)
    return {name: mask.view(part.shape) for (name, part), mask in zip(scores.items(), masks, strict=True)}


def largest_rows_overall(scores: Mapping[str, Tensor], lengths: Mapping[str, int], count: int) -> dict[str, Tensor]:
    """``True`` at the largest rows of all tensors together that hold ``count`` entries: as few rows as do, so less than
    one row more. ``scores``: one number a row, ``(rows)``; ``lengths``: the entries of each row of a tensor. Ties go
    to the earlier tensor."""
    rows = {name: len(part) for name, part in scores.items()}
    total = sum(rows[name] * lengths[name] for name in rows)
    if not 0 <= count <= total:
        raise ValueError(f"largest_rows_overall: count is {count}, expected 0 to {total}")
    # NaN sorts as the largest.
    order = torch.sort(torch.cat(list(scores.values())), descending=True, stable=True).indices
    entries = torch.cat([torch.full((rows[name],), lengths[name], device=order.device) for name in rows])[order]
    # A row is taken while those before it hold too few.
    taken = entries.cumsum(0) - entries < count
    mask = torch.zeros(len(order), dtype=torch.bool, device=order.device).scatter_(0, order, taken)
    return dict(zip(rows, mask.split(list(rows.values())), strict=True))


def kth_largest(scores: Tensor | Sequence[Tensor], k: int) -> Tensor:
    """The ``k``-th largest entry of a tensor, or of several together, k from 1, as a tensor without dimensions.

    Exact, and without a copy of all entries: a sample of them says between which two numbers it almost surely lies,
    and only the entries between these are sorted. Where the sample misleads, all entries are.
    """
    parts = [scores.flatten()] if isinstance(scores, Tensor) else [part.flatten() for part in scores]
    total = sum(map(len, parts))
    if not 1 <= k <= total:
        raise ValueError(f"kth_largest: k is {k}, expected 1 to {total}")
    if total >= _SMALL:
        low, high = _bracket(parts, k, total)
        above = sum(len(part) - int((part <= high).count_nonzero()) for part in parts)
        between = torch.cat([part[(part >= low) & (part <= high)] for part in parts])
        if above < k <= above + len(between):
            return _kth_of(between, k - above)
    return _kth_of(torch.cat(parts), k)


def _bracket(parts: list[Tensor], k: int, total: int) -> tuple[Tensor, Tensor]:
    """Two entries between which the k-th largest lies unless the sample is far off."""
    # Strided, not random: every rank takes the same, and no generator is needed.
    ordered = torch.sort(torch.cat([part[::_STRIDE] for part in parts])).values
    place = len(ordered) * (total - k) / total
    # Half a square root is the largest standard deviation of the place.
    margin = 4 * math.sqrt(len(ordered))
    low, high = math.floor(place - margin), math.ceil(place + margin)
    infinity = torch.full_like(ordered[0], math.inf)
    return (
        ordered[low] if low >= 0 else -infinity,
        ordered[high] if high < len(ordered) else infinity,
    )


def _kth_of(flat: Tensor, k: int) -> Tensor:
    if flat.device.type == "cpu":
        return flat.kthvalue(len(flat) + 1 - k).values
    # On CUDA kthvalue works with one block, and is refused under use_deterministic_algorithms.
    return torch.sort(flat).values[-k]


def _largest(parts: list[Tensor], count: int) -> list[Tensor]:
    total = sum(map(len, parts))
    if not 0 <= count <= total:
        raise ValueError(f"largest: count is {count}, expected 0 to {total}")
    if count in (0, total):
        return [torch.full_like(part, bool(count), dtype=torch.bool) for part in parts]
    threshold = kth_largest(parts, count)
    # Nothing compares with a threshold that is NaN; with any other, NaN must come out as not below it.
    lost = bool(threshold.isnan())
    masks = [part.isnan() if lost else (part < threshold).logical_not_() for part in parts]
    surplus = sum(int(mask.count_nonzero()) for mask in masks) - count
    # Equals at the threshold: the last of them go.
    for part, mask in zip(reversed(parts), reversed(masks), strict=True):
        if not surplus:
            break
        equal = mask if lost else part == threshold
        dropped = equal.nonzero().flatten()[-surplus:]
        mask[dropped] = False
        surplus -= len(dropped)
    return masks
