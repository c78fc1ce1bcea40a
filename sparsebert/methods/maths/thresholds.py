"""From scores to masks: exactly so many of the largest, at each granularity.

Every function keeps an exact count, ties going to the lower (row-major) index, so that masks are reproducible and equal
on every rank. Scores may have any sign. NaN counts as the largest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Groups of up to so many entries are ranked by comparing all pairs.
_MOST_PAIRED = 4


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
    if m <= _MOST_PAIRED and scores.is_floating_point():
        return _first_of_pairs(groups, n).view(scores.shape)
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :n]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order, True).view(scores.shape)


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The ``k``-th largest entry, k from 1, as a tensor without dimensions."""
    flat = scores.flatten()
    if flat.device.type == "cpu":
        return flat.kthvalue(len(flat) + 1 - k).values
    # On CUDA kthvalue works with one block, and is refused under use_deterministic_algorithms.
    return torch.sort(flat).values[-k]


def _first_of_pairs(groups: Tensor, n: int) -> Tensor:
    """``largest_in_groups`` by how many others beat each entry: a fifth of the time of a sort at m = 4."""
    # One block of memory for each place in the group. NaN is as large as anything.
    entries = groups.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).movedim(-1, 0).contiguous()
    beaten = torch.zeros(entries.shape, dtype=torch.uint8, device=groups.device)
    for first in range(len(entries)):
        for second in range(first + 1, len(entries)):
            wins = entries[first] >= entries[second]
            beaten[second] += wins
            beaten[first] += wins.logical_not_()
    return (beaten < n).movedim(0, -1).contiguous()


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
