"""Means over seeds, and paired differences with their intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from functools import cache
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)

LEVEL = 0.95


class Difference(NamedTuple):
    """``mean`` of ``n`` paired differences, and the ends of its 95 % interval; None where there is one pair alone."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean(values: Collection[float]) -> float:
    return math.fsum(values) / len(values)


def sd(values: Collection[float]) -> float | None:
    """sqrt(sum (x - mean)^2 / (n - 1)); None for fewer than two."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def difference(values: Collection[float]) -> Difference | None:
    """mean +- t sd / sqrt(n), t being Student's quantile for n - 1 degrees of freedom; None without values."""
    if not values:
        return None
    middle, spread = mean(values), sd(values)
    if spread is None:
        return Difference(middle, None, None, 1)
    reach = quantile(len(values) - 1) * spread / math.sqrt(len(values))
    return Difference(middle, middle - reach, middle + reach, len(values))


def paired(a: Mapping[Key, float], b: Mapping[Key, float]) -> Difference | None:
    """``difference`` of a - b over the keys that both have."""
    return difference(list(differences(a, b).values()))


def differences(a: Mapping[Key, float], b: Mapping[Key, float]) -> dict[Key, float]:
    """a - b by key, to 12 decimals: 0.3 - 0.1 - (0.2 - 0) is no difference."""
    return {key: round(a[key] - b[key], 12) for key in a if key in b}


@cache
def quantile(df: int, level: float = LEVEL) -> float:
    """The t with P(|T| < t) = ``level`` for Student's T with ``df`` degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while _inside(high, df) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, df) < level else (low, middle)
    return high


def _inside(t: float, df: int) -> float:
    """P(|T| < t), which is a finite sum for whole ``df`` (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan(t / math.sqrt(df)), df % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(odd, df - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
