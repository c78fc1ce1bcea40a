"""Nearest members of the sets that a weight is held to: P_S(V) = argmin over W in S of |V - W| (Frobenius).

A ``Pattern`` says where weights may lie; its nearest member keeps V at a mask and is zero elsewhere, so the mask that
keeps the most V² is the answer. ``Int8Grid`` says which values they may have. Ties go to the lower (row-major) place,
so that the same V gives the same member on every rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsebert.configs import BitmapConfig, NMConfig
from sparsebert.formats import int8, one_shot
from sparsebert.formats.common import largest_in_groups, wide


class Projection(ABC):
    """V ``(out, in)`` -> the nearest member of a set, of the same shape and dtype; V is left as it is."""

    @abstractmethod
    def __call__(self, values: Tensor) -> Tensor: ...

    def refusal(self, out_features: int, in_features: int) -> str | None:
        """None, or why a matrix of this shape has no member."""
        return None


class Pattern(Projection):
    """A set that says where weights may lie."""

    @abstractmethod
    def mask(self, values: Tensor) -> Tensor:
        """bool, True where the nearest member keeps V."""

    def __call__(self, values: Tensor) -> Tensor:
        return torch.where(self.mask(values), values, torch.zeros((), dtype=values.dtype, device=values.device))


@dataclass(frozen=True)
class Largest(Pattern):
    """The pattern of a config alone: the n largest |v| of every m, or the largest of the whole matrix.

    With ``columns`` the ones with the largest norms are chosen first, as everywhere in this package. That is not the
    nearest member: which columns are best depends on the groups that are left, and trying all is out of reach.
    """

    config: NMConfig | BitmapConfig

    def mask(self, values: Tensor) -> Tensor:
        if isinstance(self.config, NMConfig) and self.config.columns is None:
            return largest_in_groups(values.abs(), self.config.n, self.config.m)
        return one_shot.magnitude_mask(values, self.config)


@dataclass(frozen=True)
class Block(Pattern):
    """The ``k`` largest |v| of every tile of ``p`` rows and ``q`` columns, wherever in the tile they lie.

    ``density``: k / (p q). With p = 1 this is k:q. ``ValueError`` unless 1 <= k < p q.
    """

    p: int
    q: int
    k: int

    def __post_init__(self) -> None:
        _check_tile(type(self).__name__, self.p, self.q, self.k)

    @property
    def density(self) -> float:
        return self.k / (self.p * self.q)

    def refusal(self, out_features: int, in_features: int) -> str | None:
        return _tile_refusal(self.p, self.q, out_features, in_features)

    def mask(self, values: Tensor) -> Tensor:
        tiles = _tiles(values.abs(), self.p, self.q)
        return _untile(largest_in_groups(tiles, self.k, self.p * self.q), self.p, self.q, values.shape)


@dataclass(frozen=True, eq=False)
class Dictionary(Pattern):
    """Every tile of ``p`` rows and ``q`` columns uses one of at most ``size`` patterns with ``k`` ones: the one that
    keeps the most v².

    So a tile's pattern takes log2(size) bits. ``fit`` finds the patterns: the most frequent ones that ``Block`` would
    choose. ``patterns``: bool ``(patterns, p q)``, row-major in the tile; None until it is fitted.
    """

    p: int
    q: int
    k: int
    size: int = 32
    patterns: Tensor | None = None

    def __post_init__(self) -> None:
        _check_tile(type(self).__name__, self.p, self.q, self.k)
        if self.p * self.q > 32:
            raise ValueError(f"Dictionary: tiles are {self.p} x {self.q}, expected at most 32 weights")
        if self.size < 1:
            raise ValueError(f"Dictionary: size is {self.size}, expected at least 1")
        if self.patterns is not None and (reason := self._bad(self.patterns)):
            raise ValueError(f"Dictionary: the patterns {reason}")

    @property
    def density(self) -> float:
        return self.k / (self.p * self.q)

    def refusal(self, out_features: int, in_features: int) -> str | None:
        return _tile_refusal(self.p, self.q, out_features, in_features)

    def fit(self, weights: Iterable[Tensor]) -> Dictionary:
        """The dictionary of the ``size`` most frequent top-k tiles of all ``weights``; of equally frequent ones those
        come first that have their ones earlier."""
        area = self.p * self.q
        powers = 2 ** torch.arange(area - 1, -1, -1)
        counts: Counter[int] = Counter()
        for weight in weights:
            mask = largest_in_groups(_tiles(weight.detach().abs(), self.p, self.q), self.k, area)
            codes, found = (mask.view(-1, area).cpu() * powers).sum(-1).unique(return_counts=True)
            counts.update(dict(zip(codes.tolist(), found.tolist(), strict=True)))
        order = sorted(counts, key=lambda code: (-counts[code], -code))[: self.size]
        return replace(self, patterns=(torch.tensor(order)[:, None] & powers) != 0)

    def mask(self, values: Tensor) -> Tensor:
        if self.patterns is None:
            raise ValueError("Dictionary: has no patterns yet; call fit(weights)")
        patterns = self.patterns.to(values.device)
        tiles = _tiles(values, self.p, self.q).to(wide(values.dtype)).square()
        kept = tiles.view(len(tiles), -1, self.p * self.q) @ patterns.to(tiles.dtype).t()
        chosen = kept.argmax(-1)
        return _untile(patterns[chosen].flatten(-2), self.p, self.q, values.shape)

    def _bad(self, patterns: Tensor) -> str | None:
        area = self.p * self.q
        if not isinstance(patterns, Tensor):
            return f"are {type(patterns).__name__}, expected a tensor"
        if patterns.dtype != torch.bool or patterns.dim() != 2 or patterns.shape[1] != area:
            return f"are {patterns.dtype} {tuple(patterns.shape)}, expected torch.bool (patterns, {area})"
        if not 1 <= len(patterns) <= self.size or bool((patterns.sum(-1) != self.k).any()):
            return f"are {len(patterns)}, expected 1 to {self.size} with {self.k} ones each"
        return None


@dataclass(frozen=True, eq=False)
class Scaled(Pattern):
    """``pattern`` in another norm: the member that is nearest by |(V - W) D|, D = diag(``scale``), ``scale (in)`` above
    0. Z keeps V at the mask of ``pattern`` for V D, since a dropped v_ij costs (v_ij d_j)²."""

    pattern: Pattern
    scale: Tensor

    def refusal(self, out_features: int, in_features: int) -> str | None:
        return self.pattern.refusal(out_features, in_features)

    def mask(self, values: Tensor) -> Tensor:
        return self.pattern.mask(values * self.scale.to(values))


@dataclass(frozen=True)
class Int8Grid(Projection):
    """W[i] = a_i q_i with whole q from -127 to 127, where ``pattern`` allows a weight, and with |q| = 127 somewhere in
    every row that is not zero: exactly what the int8 format holds.

    The mask of ``pattern`` comes first. Then, from a = max|v| / 127 on, ``iterations`` times for each row::

        q = clamp(rint(v / a), -127, 127)        a = <v, q> / <q, q>

    Neither step is ever further from V, but the end need not be the nearest member; nor is it with a pattern, whose
    mask is chosen before rounding. A row whose largest weight would no longer be 127 keeps its a. At the end a moves by
    some units in the last place, to where packing finds it again, so that the result packs and unpacks without a change
    (which 16-bit floats round once more). A row that is a member already stays as it is.
    """

    pattern: Pattern | None = None
    iterations: int = 5

    def refusal(self, out_features: int, in_features: int) -> str | None:
        return None if self.pattern is None else self.pattern.refusal(out_features, in_features)

    def __call__(self, values: Tensor) -> Tensor:
        if self.pattern is not None:
            values = self.pattern(values)
        # In fp32, as packing computes; what a float64 has beyond that no member has.
        v = values.float()
        amax = v.abs().amax(-1, keepdim=True)
        scale, inv = int8.scale_of(amax)
        # A subnormal or zero row is zero: inv is 0 there, and so is all that follows.
        q = (v * inv).round_()
        for _ in range(self.iterations):
            power = q.square().sum(-1, keepdim=True)
            fitted = torch.where(power > 0, (v * q).sum(-1, keepdim=True) / power, scale)
            fits = (fitted > 0) & ((amax / fitted).round_() >= int8.LIMIT)
            scale = torch.where(fits & (inv > 0), fitted, scale)
            q = torch.where(inv > 0, v / scale, inv).round_().clamp_(-int8.LIMIT, int8.LIMIT)
        # Packing divides the largest float of the row by 127: that is its scale, which a need not be to the last bit.
        packed, _ = int8.scale_of((int8.LIMIT * scale).to(values.dtype))
        # A sum with +0.0 turns the -0.0 that rounding leaves into the zero that unpacking gives.
        member = (q * packed).add_(0.0).to(values.dtype)
        same = (on_grid(values) == values).all(-1, keepdim=True)
        return torch.where(same, values, member)


def on_grid(values: Tensor) -> Tensor:
    """V as the int8 format rounds it: a = max|v| / 127 for each row, q = rint(v / a). It packs without a change."""
    return int8.dequantize(*int8.quantize_rows(values), dtype=values.dtype)


def _check_tile(name: str, p: int, q: int, k: int) -> None:
    for label, value in (("p", p), ("q", q), ("k", k)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: {label} is {value!r}, expected an int")
    if p < 1 or q < 1 or not 1 <= k < p * q:
        raise ValueError(f"{name}: keeps {k} of {p} x {q}, expected at least 1 and fewer than all")


def _tile_refusal(p: int, q: int, out_features: int, in_features: int) -> str | None:
    if out_features % p or in_features % q:
        return f"is {out_features} x {in_features}, which tiles of {p} x {q} do not divide"
    return None


def _tiles(values: Tensor, p: int, q: int) -> Tensor:
    """``(out, in)`` -> ``(out / p, in p)``: the p q values of each tile in turn."""
    rows, columns = values.shape
    return values.reshape(rows // p, p, columns // q, q).transpose(1, 2).reshape(rows // p, columns * p)


def _untile(tiles: Tensor, p: int, q: int, shape: torch.Size) -> Tensor:
    rows, columns = shape
    return tiles.view(rows // p, columns // q, p, q).transpose(1, 2).reshape(rows, columns)
