"""Ranks of weights, and the two matrices that a rank is compared with: one whose non-zeros lie anywhere, and the
nearest one of a lower rank.

Every function takes the weight as ``(out, in)`` and computes in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# What part of the squared singular values ``rank_90`` has to hold, and how far rounding may leave it short of that.
ENERGY = 0.9
ROUNDING = 1e-9


def measure(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the layers, ``weights`` being path -> ``(out, in)``, from the singular values s_1 >= s_2 >= ...:

    - ``numerical_rank``: how many s_i > max(out, in) eps s_1, eps that of float32;
    - ``stable_rank``: |W|^2 / s_1^2 (Frobenius);
    - ``effective_rank``: exp(-sum p_i log p_i) with p_i = s_i / sum s (Roy and Vetterli: The effective rank: a measure
      of effective dimensionality, EUSIPCO 2007);
    - ``rank_90``: the least k with s_1^2 + ... + s_k^2 >= 0.9 |W|^2;
    - ``empty_rows``, ``empty_columns``: the fraction of those that are all zeros;
    - ``layers``: how many there are.

    Each rank is divided by min(out, in), so that layers of different shapes have a mean; all are 0 where the weight is
    all zeros. ``ValueError`` without layers, and naming the layer for a weight that is no matrix, has no entries or
    holds NaN or infinities.
    """
    if not weights:
        raise ValueError("measure: weights is empty, expected at least one layer")
    found = [_measure_one(_checked("measure", path, weight)) for path, weight in weights.items()]
    means = {name: sum(layer[name] for layer in found) / len(found) for name in found[0]}
    return {**means, "layers": float(len(found))}


def shuffled(weight: Tensor, generator: torch.Generator, trades: int = 5) -> Tensor:
    """``weight`` with its non-zeros elsewhere: as many in each row and in each column, and otherwise at random.

    The control for what a rank owes to the places of the zeros and not to their number. Places move by Curveball trades
    (Strona et al.: A fast and unbiased procedure to randomize ecological binary matrices with fixed row and column
    totals, Nature Communications 5, 2014): of the columns that only one of two rows has, each row gets as many as it
    had, chosen uniformly. All rows are paired at random and trade at once (Carstens et al.: Parallel and I/O-efficient
    randomisation of massive networks using global Curveball trades, ESA 2018), in 2 ``trades`` rounds, so that there
    are ``trades`` times as many trades as rows: each round halves what is left of the old row, and 0.1 % are left of it
    after the default's ten. Each row keeps its values, in random order over its new places.

    Draws come from ``generator``, and are made on its device. ``ValueError`` for a weight that is no matrix, has no
    entries or holds NaN or infinities, and unless ``trades`` is 1 or more.
    """
    if trades < 1:
        raise ValueError(f"shuffled: trades is {trades}, expected 1 or more")
    _checked("shuffled", "weight", weight)
    source = weight.detach().to(generator.device)
    mask = source != 0
    # A round is half as many trades as there are rows.
    for _ in range(2 * trades):
        _trade_(mask, generator)
    rows, columns = (source != 0).nonzero(as_tuple=True)
    order = torch.randperm(len(rows), generator=generator, device=generator.device)
    # By row again, and in the random order inside each.
    order = order[rows[order].argsort(stable=True)]
    result = torch.zeros_like(source)
    # Both are row-major, and no row has more or fewer places than values.
    result[mask] = source[rows[order], columns[order]]
    return result.to(weight.device)


def truncated(weight: Tensor, rank: int) -> Tensor:
    """The matrix of ``rank`` that is nearest to ``weight`` (Frobenius), in its dtype: its truncated SVD.

    ``ValueError`` for a rank outside 0 to min(out, in) and a weight that is no matrix, has no entries or holds NaN or
    infinities.
    """
    values = _checked("truncated", "weight", weight)
    if not 0 <= rank <= min(values.shape):
        raise ValueError(f"truncated: rank is {rank}, expected 0 to {min(values.shape)} for {tuple(values.shape)}")
    left, singular, right = torch.linalg.svd(values, full_matrices=False)
    return ((left[:, :rank] * singular[:rank]) @ right[:rank]).to(weight.dtype)


def _measure_one(weight: Tensor) -> dict[str, float]:
    full = min(weight.shape)
    ranks = dict.fromkeys(("numerical_rank", "stable_rank", "effective_rank", "rank_90"), 0.0)
    if weight.any():
        singular = torch.linalg.svdvals(weight)
        # Before anything is squared: numbers near the ends of float64's range stay inside it.
        singular = singular / singular[0]
        energy = singular.square().cumsum(0)
        shares = singular / singular.sum()
        short = energy < (ENERGY - ROUNDING) * energy[-1]
        ranks = {
            "numerical_rank": float((singular > max(weight.shape) * torch.finfo(torch.float32).eps).sum()),
            "stable_rank": float(energy[-1]),
            "effective_rank": float(torch.special.entr(shares).sum().exp()),
            "rank_90": float(short.sum() + 1),
        }
    occupied = weight != 0
    return {
        **{name: rank / full for name, rank in ranks.items()},
        "empty_rows": float((~occupied.any(1)).double().mean()),
        "empty_columns": float((~occupied.any(0)).double().mean()),
    }


def _trade_(mask: Tensor, generator: torch.Generator) -> None:
    """One trade of every row of ``mask (rows, columns)`` but the odd one, each with a random other, in place."""
    pairs = len(mask) // 2
    order = torch.randperm(len(mask), generator=generator, device=mask.device)
    first, second = order[:pairs], order[pairs : 2 * pairs]
    ours, theirs = mask[first], mask[second]
    contested = ours ^ theirs
    keys = torch.rand(contested.shape, generator=generator, device=mask.device)
    # The contested columns in random order, then all others; the first row takes from the front what it had of them.
    places = keys.masked_fill_(~contested, 2.0).argsort(1)
    count = (ours & contested).sum(1, keepdim=True)
    taken = torch.arange(mask.shape[1], device=mask.device) < count
    taken = torch.zeros_like(contested).scatter_(1, places, taken)
    shared = ours & theirs
    mask[first] = shared | taken
    mask[second] = shared | (contested & ~taken)


def _checked(what: str, path: str, weight: Tensor) -> Tensor:
    """The weight in float64, detached."""
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"{what}: {path}: weight is {tuple(weight.shape)}, expected a matrix with entries")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{what}: {path}: weight holds NaN or infinities")
    return weight.detach().double()
