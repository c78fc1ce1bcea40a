"""From scores to masks: exactly so many of the largest, at each granularity.

Every function keeps an exact count, ties going to the lower (row-major) index, so that masks are reproducible and equal
on every rank. Scores may have any sign. NaN counts as the largest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def largest(scores: Tensor, count: int) -> Tensor:
    """``True`` at the ``count`` largest entries of a tensor of any shape."""
    return _largest(scores.flatten(), count).view(scores.shape)


def largest_overall(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """``True`` at the ``count`` largest entries of all tensors together; ties go to the earlier tensor."""
    parts = {name: part.flatten() for name, part in scores.items()}
    masks = _largest(torch.cat(list(parts.values())), count).split([len(part) for part in parts.values()])
    return {name: mask.view(scores[name].shape) for name, mask in zip(parts, masks, strict=True)}


def largest_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """``True`` at the ``n`` largest of every ``m`` consecutive entries of the last dimension, which ``m`` divides."""
    if scores.shape[-1] % m:
        raise ValueError(f"largest_in_groups: {scores.shape[-1]} entries a row, expected a multiple of {m}")
    groups = scores.unflatten(-1, (-1, m))
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :n]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order, True).view(scores.shape)


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


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The ``k``-th largest entry, k from 1, as a tensor without dimensions."""
    flat = scores.flatten()
    if flat.device.type == "cpu":
        return flat.kthvalue(len(flat) + 1 - k).values
    # On CUDA kthvalue works with one block, and is refused under use_deterministic_algorithms.
    return torch.sort(flat).values[-k]


def _largest(scores: Tensor, count: int) -> Tensor:
    if not 0 <= count <= len(scores):
        raise ValueError(f"largest: count is {count}, expected 0 to {len(scores)}")
    if count in (0, len(scores)):
        return torch.full_like(scores, bool(count), dtype=torch.bool)
    threshold = kth_largest(scores, count)
    mask = (scores < threshold).logical_not_()
    if (surplus := int(mask.sum()) - count) > 0:
        # Equals at the threshold: the last of them go.
        equals = (scores == threshold).nonzero().flatten()
        mask[equals[len(equals) - surplus :]] = False
    return mask
