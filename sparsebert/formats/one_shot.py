"""One-shot compression of a weight: the nearest one (Frobenius norm) that a config can hold, without any training.

n:m, bitmap and rows keep the largest weights, which is the projection. Low rank is the truncated SVD, which is the
nearest too (Eckart and Young 1936). Low rank plus sparse first takes the low-rank part and then the projection of what
is left, W = u v + S with S = P(W - u v), as LoSparse starts (Li et al., ICML 2023). Int8 leaves the weight as it is, or
projects it on its pattern: rounding belongs to packing. Dense leaves it as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsebert.configs import (
    BitmapConfig,
    Config,
    DenseConfig,
    Int8Config,
    LowRankConfig,
    LowRankSparseConfig,
    NMConfig,
    RowsConfig,
    SparseConfig,
)
from sparsebert.formats import bitmap, low_rank, nm, rows
from sparsebert.formats.common import refuse_non_finite


class Approximation(NamedTuple):
    """A weight ``(out, in)`` that obeys a config, and the factors it is made of: ``u``, ``v`` and ``sparse`` where the
    config has them."""

    weight: Tensor
    factors: dict[str, Tensor]


def approximate(weight: Tensor, config: Config, *, name: str = "weight") -> Approximation:
    """The nearest weight that ``config`` can hold, in the dtype of ``weight``.

    ``ValueError`` naming the layer ``name`` where the weight holds NaN or infinities.
    """
    refuse_non_finite(weight, f"{name}: weight")
    if isinstance(config, DenseConfig):
        return Approximation(weight, {})
    if isinstance(config, NMConfig | BitmapConfig):
        return Approximation(_keep(weight, magnitude_mask(weight, config)), {})
    if isinstance(config, Int8Config):
        return Approximation(weight, {}) if config.weights is None else approximate(weight, config.weights, name=name)
    u, v = low_rank.factorize(weight, rank_of(config, *weight.shape))
    product = low_rank.unpack(u, v)
    if isinstance(config, LowRankConfig):
        return Approximation(product, {"u": u, "v": v})
    remainder = weight - product
    sparse = _keep(remainder, magnitude_mask(remainder, config.sparse))  # type: ignore[arg-type]
    return Approximation(product + sparse, {"u": u, "v": v, "sparse": sparse})


def magnitude_mask(weight: Tensor, config: SparseConfig) -> Tensor:
    """``True`` at the weights that magnitude keeps under ``config``; columns first, where it drops some."""
    if isinstance(config, BitmapConfig):
        return bitmap.magnitude_mask(weight, bitmap.keep_count(config.density, *weight.shape))
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    if isinstance(config, RowsConfig):
        mask[rows.magnitude_rows(weight, rows.row_count(config.ratio, weight.shape[0])).long()] = True
        return mask
    if config.columns is None:
        return nm.magnitude_mask(weight, config.n, config.m)
    count = nm.column_count(weight.shape[1], config.columns, config.m)
    columns = nm.choose_columns(weight, count).long()
    mask[:, columns] = nm.magnitude_mask(weight[:, columns].contiguous(), config.n, config.m)
    return mask


def rank_of(config: LowRankConfig | LowRankSparseConfig, out_features: int, in_features: int) -> int:
    """The rank that a config means for a matrix."""
    if config.rank is not None:
        return config.rank
    return low_rank.rank_for_ratio(config.ratio, out_features, in_features)  # type: ignore[arg-type]


def find_violation(weight: Tensor, config: Config, factors: dict[str, Tensor], *, name: str) -> str | None:
    """None, or what in ``weight`` or its ``factors`` breaks ``config``, in words that follow the layer's name."""
    if isinstance(config, DenseConfig):
        return None
    if isinstance(config, Int8Config):
        return None if config.weights is None else find_violation(weight, config.weights, {}, name=name)
    if isinstance(config, LowRankConfig | LowRankSparseConfig):
        return _factor_violation(weight, config, factors, name)
    return _sparse_violation(weight, config, "weight", name)


def _sparse_violation(weight: Tensor, config: SparseConfig, label: str, name: str) -> str | None:
    if isinstance(config, BitmapConfig):
        found, most = int((weight != 0).sum()), bitmap.keep_count(config.density, *weight.shape)
        return f"{label} holds {found} non-zeros, expected at most {most} at {config}" if found > most else None
    if isinstance(config, RowsConfig):
        found, most = int((weight != 0).any(1).sum()), rows.row_count(config.ratio, weight.shape[0])
        return f"{label} has {found} non-zero rows, expected at most {most} at {config}" if found > most else None
    columns = torch.arange(weight.shape[1])
    if config.columns is not None:
        count = nm.column_count(weight.shape[1], config.columns, config.m)
        found = int((weight != 0).any(0).sum())
        if found > count:
            return f"{label} has {found} non-zero columns, expected at most {count} at {config}"
        columns = nm.kept_columns(weight, count, name=name).long().cpu()
        weight = weight[:, columns]
    if (bad := nm.find_violation(weight, config.n, config.m)) is None:
        return None
    row, column, count = bad
    first, last = int(columns[column]), int(columns[column + config.m - 1])
    return (
        f"{label} does not obey {config}: row {row}, columns {first} to {last} hold {count} non-zeros, "
        f"expected at most {config.n}"
    )


def _factor_violation(
    weight: Tensor, config: LowRankConfig | LowRankSparseConfig, factors: dict[str, Tensor], name: str
) -> str | None:
    expected = {"u", "v"} | ({"sparse"} if isinstance(config, LowRankSparseConfig) else set())
    if factors.keys() != expected:
        found = ", ".join(sorted(factors)) or "none"
        return f"the plan has the factors {found}, expected {', '.join(sorted(expected))} for {config}"
    rank = rank_of(config, *weight.shape)
    u, v = factors["u"], factors["v"]
    for label, factor, shape in (
        ("u", u, (weight.shape[0], rank)),
        ("v", v, (rank, weight.shape[1])),
        ("sparse", factors.get("sparse", weight), tuple(weight.shape)),
    ):
        if tuple(factor.shape) != shape:
            return f"factor {label} has shape {tuple(factor.shape)}, expected {shape} for {config}"
        if not factor.is_floating_point() or not torch.isfinite(factor).all():
            return f"factor {label} is {factor.dtype} or holds NaN or infinities, expected finite floats"
    made = low_rank.unpack(u.to(weight), v.to(weight))
    if isinstance(config, LowRankSparseConfig):
        sparse = factors["sparse"].to(weight)
        if reason := _sparse_violation(sparse, config.sparse, "factor sparse", name):  # type: ignore[arg-type]
            return reason
        made = made + sparse
    difference = float((weight.double() - made.double()).abs().max()) if weight.numel() else 0.0
    # Sums in another order, on another device: some units in the last place of the largest weight.
    allowed = 32 * torch.finfo(weight.dtype).eps * float(weight.abs().max()) if weight.numel() else 0.0
    if not difference <= allowed:
        return f"weight differs from what its factors make by up to {difference:.3g}, expected at most {allowed:.3g}"
    return None


def _keep(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
