"""Scores of predictions over a whole data set. F1 and correlations are no means of batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CLASSIFICATION = ("accuracy", "f1", "matthews")
REGRESSION = ("pearson", "spearman")
NAMES = {
    "accuracy": "accuracy",
    "f1": "F1 of class 1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}


def classification(labels: Sequence[int], predicted: Sequence[int], classes: int) -> dict[str, float]:
    """``accuracy``, ``matthews`` and, for two classes, ``f1`` of class 1 (0 where there is nothing to divide by).

    With the confusion counts C (label, prediction), s their sum, c their diagonal's, t and p the sums of rows and
    columns, Matthews' correlation of K classes is (c s - t.p) / sqrt((s^2 - p.p) (s^2 - t.t)).
    """
    if len(labels) != len(predicted) or not labels:
        raise ValueError(f"metrics: {len(predicted)} predictions for {len(labels)} labels, expected one for each")
    counts = [[0] * classes for _ in range(classes)]
    for label, prediction in zip(labels, predicted, strict=True):
        counts[label][prediction] += 1
    total, right = len(labels), sum(counts[i][i] for i in range(classes))
    actual = [sum(row) for row in counts]
    said = [sum(row[i] for row in counts) for i in range(classes)]
    scores = {"accuracy": right / total}
    if classes == 2:
        scores["f1"] = 2 * counts[1][1] / (actual[1] + said[1]) if actual[1] + said[1] else 0.0
    # Python's ints: products of counts do not overflow.
    spread = (total**2 - sum(n * n for n in said)) * (total**2 - sum(n * n for n in actual))
    both = right * total - sum(t * p for t, p in zip(actual, said, strict=True))
    scores["matthews"] = both / math.sqrt(spread) if spread else 0.0
    return scores


def regression(labels: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """``pearson``, the correlation, and ``spearman``, that of the ranks, equals sharing their mean rank; 0 where one
    side is constant."""
    if len(labels) != len(predicted) or not labels:
        raise ValueError(f"metrics: {len(predicted)} predictions for {len(labels)} labels, expected one for each")
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (labels, predicted))
    return {"pearson": _correlation(a, b), "spearman": _correlation(_ranks(a), _ranks(b))}


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    spread = float(a.norm() * b.norm())
    return float(a @ b) / spread if spread else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, group, size = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = size.cumsum(0).double()
    return (last - (size.double() - 1) / 2)[group]
