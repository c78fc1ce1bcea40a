"""What a layer is compressed to: small frozen dataclasses that survive a JSON and a text round trip.

``str(config)`` is how the command line writes it, and ``parse_config`` reads it back::

    2:4  2:4@0.5  bitmap:0.1  low-rank:0.25  low-rank:r64  low-rank:0.15+rows:0.1  int8  int8-static  int8+2:4  dense
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

GROUP_SIZES = (2, 4, 8, 16)
ACTIVATION_MODES = ("dynamic", "static")


@dataclass(frozen=True)
class NMConfig:
    """n:m pattern sparsity: of every ``m`` consecutive weights along ``in_features``, at most ``n`` are non-zero.

    ``NMConfig(2, 4)`` is the pattern of NVIDIA's sparse tensor cores. ``n`` counts the weights that are *kept*
    (1:4 keeps a quarter). ``m`` is 2, 4, 8 or 16 and ``1 <= n < m``; anything else is a ``ValueError``.

    ``columns``: the fraction of input columns that is kept, the same ones for all rows; the pattern holds inside the
    kept ones. Above 0 and below 1, or None for all of them.
    """

    n: int
    m: int
    columns: float | None = None

    format: ClassVar[str] = "nm"

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("m", self.m)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"NMConfig: {name} is {value!r}, expected an int")
        if self.m not in GROUP_SIZES:
            raise ValueError(f"NMConfig: m is {self.m}, expected one of {', '.join(map(str, GROUP_SIZES))}")
        if not 1 <= self.n < self.m:
            raise ValueError(f"NMConfig: n is {self.n}, expected 1 <= n < m = {self.m} (n of every m weights are kept)")
        if self.columns is not None:
            _check_fraction("NMConfig", "columns", self.columns, below_one=True)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + ("" if self.columns is None else f"@{self.columns:g}")

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


@dataclass(frozen=True)
class BitmapConfig:
    """Unstructured sparsity: the fraction ``density`` of all weights of the matrix is kept, wherever they lie.

    Above 0 and at most 1; anything else is a ``ValueError``.
    """

    density: float

    format: ClassVar[str] = "bitmap"

    def __post_init__(self) -> None:
        _check_fraction("BitmapConfig", "density", self.density)

    def __str__(self) -> str:
        return f"bitmap:{self.density:g}"

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


@dataclass(frozen=True)
class RowsConfig:
    """Row sparsity: the fraction ``ratio`` of the rows (output neurons) is kept. A part of ``LowRankSparseConfig``."""

    ratio: float

    format: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        _check_fraction("RowsConfig", "ratio", self.ratio)

    def __str__(self) -> str:
        return f"rows:{self.ratio:g}"

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


@dataclass(frozen=True)
class LowRankConfig:
    """W = u v with u ``(out, rank)`` and v ``(rank, in)``: give either ``rank`` or ``ratio``.

    ``ratio`` is stored over dense parameters: rank = floor(ratio * out * in / (out + in)), at least 1. Above 0 and at
    most 1; rank a positive int. ``ValueError`` where both or neither is given.
    """

    rank: int | None = None
    ratio: float | None = None

    format: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        _check_rank("LowRankConfig", self.rank, self.ratio)

    def __str__(self) -> str:
        return f"low-rank:r{self.rank}" if self.rank is not None else f"low-rank:{self.ratio:g}"

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


@dataclass(frozen=True)
class LowRankSparseConfig:
    """W = u v + S: a low-rank part (``rank`` or ``ratio`` as in ``LowRankConfig``) and a sparse one, ``sparse``.

    ``sparse`` is a ``RowsConfig``, ``NMConfig`` (without columns) or ``BitmapConfig``; its own ratio or density comes
    on top of the low-rank part's.
    """

    rank: int | None = None
    ratio: float | None = None
    sparse: RowsConfig | NMConfig | BitmapConfig | None = None

    format: ClassVar[str] = "low_rank_sparse"

    def __post_init__(self) -> None:
        _check_rank("LowRankSparseConfig", self.rank, self.ratio)
        if not isinstance(self.sparse, RowsConfig | NMConfig | BitmapConfig):
            raise TypeError(
                f"LowRankSparseConfig: sparse is {type(self.sparse).__name__}, expected RowsConfig, NMConfig or "
                f"BitmapConfig"
            )
        if isinstance(self.sparse, NMConfig) and self.sparse.columns is not None:
            raise ValueError("LowRankSparseConfig: sparse has columns, expected an NMConfig without")

    def __str__(self) -> str:
        return f"{LowRankConfig(self.rank, self.ratio)}+{self.sparse}"

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


@dataclass(frozen=True)
class Int8Config:
    """8-bit integers, symmetric: weights with a scale for each output channel, activations with one for each token.

    ``activations``: ``dynamic`` (the scale is that of the token at hand) or ``static`` (one scale for all, which
    ``sparsebert.calibrate`` measures). ``weights``: None, or an ``NMConfig`` (without columns) that they also obey.
    """

    activations: str = "dynamic"
    weights: NMConfig | None = None

    format: ClassVar[str] = "int8"

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATION_MODES:
            raise ValueError(
                f"Int8Config: activations is {self.activations!r}, expected one of {', '.join(ACTIVATION_MODES)}"
            )
        if self.weights is not None and not isinstance(self.weights, NMConfig):
            raise TypeError(f"Int8Config: weights is {type(self.weights).__name__}, expected NMConfig or None")
        if self.weights is not None and self.weights.columns is not None:
            raise ValueError("Int8Config: weights has columns, expected an NMConfig without")

    def __str__(self) -> str:
        mode = "" if self.activations == "dynamic" else "-static"
        return f"int8{mode}" + ("" if self.weights is None else f"+{self.weights}")

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


@dataclass(frozen=True)
class DenseConfig:
    """The dense weight as it is, in a packed layer: rows that the next layer does not read can then be dropped."""

    format: ClassVar[str] = "dense"

    def __str__(self) -> str:
        return "dense"

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


# What a layer can be compressed to. RowsConfig is only a part of another.
Config = NMConfig | BitmapConfig | LowRankConfig | LowRankSparseConfig | Int8Config | DenseConfig
SparseConfig = RowsConfig | NMConfig | BitmapConfig
CONFIG_TYPES = (NMConfig, BitmapConfig, LowRankConfig, LowRankSparseConfig, Int8Config, DenseConfig)

_BY_FORMAT: dict[str, Any] = {kind.format: kind for kind in (*CONFIG_TYPES, RowsConfig)}
_NUMBER = r"(\d+(?:\.\d+)?)"


def config_from_dict(data: Any) -> Config:
    """Inverse of ``to_dict``; ``ValueError`` or ``TypeError`` for unknown formats, stray keys and bad values."""
    config = _from_dict(data)
    if isinstance(config, RowsConfig):
        raise ValueError("config: format 'rows' is only the sparse part of 'low_rank_sparse'")
    return config


def parse_config(text: str) -> Config:
    """A config as it is written on a command line (see the module's docstring); ``ValueError`` where it is none."""
    config = _parse(text.strip())
    if config is None or isinstance(config, RowsConfig):
        raise ValueError(
            f"{text!r} is no format; write one of 2:4, 2:4@0.5 (half of the columns), bitmap:0.1, low-rank:0.25, "
            f"low-rank:r64, low-rank:0.15+rows:0.1, int8, int8-static, int8+2:4, dense"
        )
    return config


def _parse(text: str) -> Config | RowsConfig | None:
    if match := re.fullmatch(rf"(\d{{1,2}}):(\d{{1,2}})(?:@{_NUMBER})?", text):
        return NMConfig(int(match[1]), int(match[2]), None if match[3] is None else float(match[3]))
    if match := re.fullmatch(rf"bitmap:{_NUMBER}", text):
        return BitmapConfig(float(match[1]))
    if match := re.fullmatch(rf"rows:{_NUMBER}", text):
        return RowsConfig(float(match[1]))
    if match := re.fullmatch(rf"low-rank:(?:r(\d+)|{_NUMBER})(?:\+(.+))?", text):
        rank = None if match[1] is None else int(match[1])
        ratio = None if match[2] is None else float(match[2])
        if match[3] is None:
            return LowRankConfig(rank, ratio)
        sparse = _parse(match[3])
        return LowRankSparseConfig(rank, ratio, sparse) if isinstance(sparse, SparseConfig) else None
    if match := re.fullmatch(r"int8(-static)?(?:\+(.+))?", text):
        weights = None if match[2] is None else _parse(match[2])
        if weights is None or isinstance(weights, NMConfig):
            return None if match[2] and weights is None else Int8Config("static" if match[1] else "dynamic", weights)
    return DenseConfig() if text == "dense" else None


def _to_dict(config: Any) -> dict[str, Any]:
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    nested = {name: _to_dict(value) if is_dataclass(value) else value for name, value in values.items()}
    # What was not chosen is left out: a file of an older version then reads the same.
    return {"format": config.format, **{name: value for name, value in nested.items() if value is not None}}


def _from_dict(data: Any) -> Any:
    if not isinstance(data, dict):
        raise TypeError(f"config: got {type(data).__name__}, expected a JSON object")
    values = {name: _from_dict(value) if isinstance(value, dict) else value for name, value in data.items()}
    kind = values.pop("format", None)
    if not isinstance(kind, str) or kind not in _BY_FORMAT:
        raise ValueError(f"config: format is {kind!r}, expected one of {sorted(_BY_FORMAT)}")
    try:
        return _BY_FORMAT[kind](**values)
    except TypeError as error:
        raise ValueError(f"config: cannot read {data!r} as {kind!r}: {error}") from error


def _check_fraction(config: str, name: str, value: Any, *, below_one: bool = False) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{config}: {name} is {value!r}, expected a number")
    if not (math.isfinite(value) and 0 < value <= 1) or (below_one and value == 1):
        raise ValueError(f"{config}: {name} is {value}, expected above 0 and {'below' if below_one else 'at most'} 1")


def _check_rank(config: str, rank: Any, ratio: Any) -> None:
    if (rank is None) == (ratio is None):
        raise ValueError(f"{config}: rank is {rank!r} and ratio is {ratio!r}, expected exactly one of them")
    if ratio is not None:
        _check_fraction(config, "ratio", ratio)
    elif not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"{config}: rank is {rank!r}, expected an int")
    elif rank < 1:
        raise ValueError(f"{config}: rank is {rank}, expected at least 1")
