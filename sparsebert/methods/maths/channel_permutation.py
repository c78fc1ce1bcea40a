"""Which order of a weight's columns keeps the most magnitude at n:m: a greedy search by swaps.

As in Pool and Yu: Channel Permutations for N:M Sparsity (NeurIPS 2021): every swap of two columns of different groups
is valued by the magnitude it keeps, swaps are made best first, one a group in each round, until none helps.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A swap has to gain this part of the whole magnitude, or rounding would swap forever.
_LEAST_GAIN = 1e-7


def kept_magnitude(weight: Tensor, n: int, m: int) -> float:
    """Sum of |w| that n:m keeps of ``weight (out, in)``."""
    return float(weight.detach().abs().double().unflatten(1, (-1, m)).topk(n, dim=-1).values.sum())


def find_permutation(weight: Tensor, n: int, m: int, *, rounds: int = 100) -> Tensor:
    """int64 ``(in,)``: ``weight[:, permutation]`` keeps at least as much magnitude at n:m as ``weight (out, in)``, and
    no single swap keeps more, unless ``rounds`` ran out. ``m`` must divide ``in``; n is below m.

    Let c be a column of group g and t_c (out) the n-th largest |w| of the other m - 1 columns of g. With x in the place
    of c, the group keeps what it keeps of the others, at n - 1, and max(t_c, |x|). Summed over rows that is half of
    |t_c|_1 + |x|_1 + |t_c - |x||_1, so all swaps follow from one matrix of L1 distances, ``(in, in)``.
    """
    if weight.dim() != 2 or weight.shape[1] % m or not 0 < n < m:
        raise ValueError(
            f"find_permutation: weight is {tuple(weight.shape)}, expected (out, a multiple of {m}), {n}:{m}"
        )
    columns = weight.detach().abs().float().t().contiguous()
    count = len(columns)
    order = torch.arange(count, device=weight.device)
    if count == m or not columns.any():
        return order
    least = _LEAST_GAIN * float(columns.sum())
    groups = torch.arange(count, device=weight.device) // m
    kept = torch.empty(count // m, device=weight.device)
    # with_other[c, x]: what the group of place c keeps with the column at place x in place of c.
    with_other = torch.empty(count, count, device=weight.device)
    stale = torch.arange(count // m, device=weight.device)
    for _ in range(rounds):
        places = (stale.unsqueeze(1) * m + torch.arange(m, device=weight.device)).flatten()
        held = columns[order]
        in_groups = held[places].unflatten(0, (-1, m))
        kept[stale] = in_groups.topk(n, dim=1).values.sum((1, 2))
        base, threshold = _without_each(in_groups, n)
        with_other[places] = _kept_with(base, threshold, held)
        others = held.unflatten(0, (-1, m))
        base, threshold = _without_each(others, n)
        with_other[:, places] = _kept_with(base, threshold, held[places])
        of_place = kept[groups]
        gains = with_other + with_other.t() - of_place.unsqueeze(1) - of_place
        swaps = _best_swaps(gains, groups, least)
        if not swaps:
            break
        for a, b in swaps:
            order[[a, b]] = order[[b, a]]
        stale = torch.tensor(sorted({place // m for swap in swaps for place in swap}), device=weight.device)
    return order


def _without_each(groups: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """``groups (g, m, rows)`` -> for each column what the others keep at n - 1, ``(g * m)``, and their n-th largest,
    ``(g * m, rows)``."""
    m = groups.shape[1]
    # [g, column that is left out, the others, rows]
    others = groups[:, [[j for j in range(m) if j != i] for i in range(m)]]
    top = others.topk(n, dim=2).values
    return top[:, :, : n - 1].sum((2, 3)).flatten(), top[:, :, n - 1].flatten(0, 1)


def _kept_with(base: Tensor, threshold: Tensor, columns: Tensor) -> Tensor:
    """``base + sum over rows of max(threshold, column)`` for every pair."""
    either = threshold.sum(1).unsqueeze(1) + columns.sum(1) + torch.cdist(threshold, columns, p=1)
    return base.unsqueeze(1) + either / 2


def _best_swaps(gains: Tensor, groups: Tensor, least: float) -> list[tuple[int, int]]:
    """Pairs of places, best first, none in a group that an earlier one touches."""
    allowed = torch.triu(groups.unsqueeze(1) != groups, diagonal=1) & (gains > least)
    rows, columns = allowed.nonzero(as_tuple=True)
    order = torch.sort(gains[rows, columns], descending=True, stable=True).indices
    touched: set[int] = set()
    found = []
    first, second = groups[rows[order]].tolist(), groups[columns[order]].tolist()
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        if a not in touched and b not in touched:
            touched |= {a, b}
            found.append((int(rows[order[k]]), int(columns[order[k]])))
    return found
