"""What is held against what: the best dense path of a layer, and what each format makes of it.

The *best dense path* is the fastest row of group ``dense`` with status ``ok`` at the same sizes, token count,
activation and dtype of the weight before it was quantized: fp16 against fp16, bf16 against bf16, an int8 format made of
fp16 weights against fp16. A *speed-up* is its median time over that of the format's fastest backend. A time that
differs from the dense one by no more than max(2 %, 3 MAD) is ``equal``: no win, and no loss either. Times are taken
relative to that of a dense linear which ran in turns with each (``steadied``).
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparsebert.ops.measurements import margin_us

Row = dict[str, Any]

FASTER, EQUAL, SLOWER = "faster", "equal", "slower"
NOT_MEASURED = "not measured"
# What tells inputs apart, of a layer and of a model.
_INPUT = {
    "linear": ("out_features", "in_features", "tokens", "activation", "mode", "anchor"),
    "model": ("model", "batch", "length", "lengths", "mode", "anchor"),
}
_TIMES = ("median_us", "mad_us", "p20_us", "p80_us", "p95_us", "p99_us", "anchor_us")
_RATES = ("sequences_per_s", "tokens_per_s")
OTHER_MODE = "timed otherwise"
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class Problem(NamedTuple):
    """What peers do alike, whatever the token count. ``dtype`` is fp16, bf16 or fp32."""

    out_features: int
    in_features: int
    activation: str
    dtype: str


class Outcome(NamedTuple):
    """What one format or peer made of a problem. ``text`` is the verdict, or the status where there is no number."""

    text: str
    row: Row | None = None
    speed_up: float | None = None


@dataclass(frozen=True)
class Point:
    """One problem at one token count; ``roles`` are the layers that it is of."""

    problem: Problem
    tokens: int
    roles: tuple[str, ...]
    dense: Row | None
    formats: Mapping[str, Outcome]
    library: Mapping[str, Outcome]

    @property
    def name(self) -> str:
        return name_of(self.problem, self.roles)


@dataclass(frozen=True)
class BreakEven:
    """Where one format beats the best dense path: its verdict at each token count that dense was measured at."""

    problem: Problem
    roles: tuple[str, ...]
    format: str
    verdicts: Mapping[int, str]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The first and last count of each unbroken stretch of wins. A count where the format does not win, or was not
        measured, ends a stretch."""
        found: list[tuple[int, int]] = []
        before = ""
        for tokens, verdict in sorted(self.verdicts.items()):
            if verdict == FASTER:
                found = [*found[:-1], (found[-1][0], tokens)] if before == FASTER else [*found, (tokens, tokens)]
            before = verdict
        return found

    def __str__(self) -> str:
        """``from 512 up`` (to the largest count measured), ``from 1 to 32``, ``at 128``, ``never``, or why there is no
        number."""
        verdicts = self.verdicts
        if not any(verdict in (FASTER, EQUAL, SLOWER) for verdict in verdicts.values()):
            return Counter(verdicts.values()).most_common(1)[0][0] if verdicts else NOT_MEASURED
        last = max(verdicts)
        parts = []
        for first, end in self.ranges:
            one = "at {0}" if first == end else "from {0} to {1}"
            parts.append(("from {0} up" if end == last and first < end else one).format(first, end))
        holes = [str(tokens) for tokens, verdict in sorted(verdicts.items()) if verdict == NOT_MEASURED]
        missing = f" (not measured at {', '.join(holes)})" if holes else ""
        return (", ".join(parts) or "never") + missing


def name_of(problem: Problem, roles: Sequence[str]) -> str:
    """``base.ffn_in 3072 x 768, gelu``; fp16 and no activation go without saying."""
    more = [text for text in (problem.activation, problem.dtype) if text not in ("none", "fp16")]
    return ", ".join([f"{' / '.join(roles)} {problem.out_features} x {problem.in_features}", *more])


def dtype_of(row: Row) -> str | None:
    """fp16, bf16 or fp32: the dtype of the weight, quantized or not; None where the row does not say."""
    for text in (row.get("weight_dtype"), row.get("dtype")):
        for long, short in _DTYPES.items():
            if text and (long in text or short in text):
                return short
    return None


def steadied(rows: Iterable[Row]) -> list[Row]:
    """Rows with their times as they would be had the machine run all of them alike.

    Times (in microseconds) times a / ``anchor_us``, rates over that: the anchor, torch's dense linear or a dense model,
    was timed in turns with each row, and a is the median of its times beside all rows of the same input. Rows without
    one stay as they are.
    """
    rows = list(rows)
    anchors: dict[tuple[Any, ...], list[float]] = defaultdict(list)

    def place(row: Row) -> tuple[Any, ...]:
        return row["kind"], *(row[name] for name in _INPUT[row["kind"]])

    beside = [row for row in rows if row["kind"] in _INPUT and timed(row) and row.get("anchor_us")]
    for row in beside:
        anchors[place(row)].append(row["anchor_us"])
    factors = {id(row): statistics.median(anchors[place(row)]) / row["anchor_us"] for row in beside}
    return [_scaled(row, factors[id(row)]) if id(row) in factors else row for row in rows]


def _scaled(row: Row, factor: float) -> Row:
    times = {name: row[name] * factor for name in _TIMES if row.get(name) is not None}
    rates = {name: row[name] / factor for name in _RATES if row.get(name) is not None}
    return {**row, **times, **rates}


def points(rows: Iterable[Row]) -> list[Point]:
    """Every problem and token count of the op sweep, in order of role, size and count; times are ``steadied``."""
    # A row of this package without a format is a part of a layer, or several, and compares with none.
    linears = [
        row
        for row in steadied(rows)
        if row["kind"] == "linear" and (row.get("group") in ("dense", "library") or row.get("format"))
    ]
    found: dict[tuple[Problem, int], list[Row]] = defaultdict(list)
    nameless: dict[tuple[int, int, str, int], list[Row]] = defaultdict(list)
    roles: dict[Problem, list[str]] = defaultdict(list)
    for row in linears:
        sizes = (row["out_features"], row["in_features"], row["activation"])
        if (dtype := dtype_of(row)) is None:
            # A library's int8, which may stand beside any dtype that the layer has outside of it.
            nameless[*sizes, row["tokens"]].append(row)
            continue
        problem = Problem(*sizes, dtype)
        found[problem, row["tokens"]].append(row)
        roles[problem].append(row["role"])
    result = []
    for (problem, tokens), here in found.items():
        beside = nameless.get((*problem[:3], tokens), [])
        known = tuple(sorted(set(roles[problem])))
        result.append(_point(problem, tokens, known, [*here, *beside]))
    return sorted(result, key=lambda point: (point.roles, point.problem, point.tokens))


def variants(points: Iterable[Point]) -> list[tuple[str, str]]:
    """The activations and dtypes that there are, the plainest first: none and fp16."""
    found = {(point.problem.activation, point.problem.dtype) for point in points}
    return sorted(found, key=lambda variant: (variant[0] != "none", variant[1] != "fp16", variant))


def of_variant(points: Iterable[Point], variant: tuple[str, str]) -> list[Point]:
    return [point for point in points if (point.problem.activation, point.problem.dtype) == variant]


def never_slower(rows: Iterable[Row]) -> list[Row]:
    """The ``never_slower`` rows, held against the best dense path of the whole run.

    Such a layer was timed in turns with torch's linear. Where the op sweep of the same run has a dense path that takes
    only a part of that linear's time, ``dense_us`` becomes that part, and ``status`` follows from it.
    """
    rows = list(rows)
    best = {(point.problem, point.tokens): point.dense for point in points(rows) if point.dense}
    return [_against_best(row, best) for row in rows if row["kind"] == "never_slower"]


def _against_best(row: Row, best: Mapping[tuple[Problem, int], Row]) -> Row:
    problem = Problem(row["out_features"], row["in_features"], "none", dtype_of(row) or "")
    dense = best.get((problem, row["tokens"]))
    if dense is None or not dense.get("anchor_us") or row.get("status") not in ("ok", "failed"):
        return row
    part = dense["median_us"] / dense["anchor_us"]
    if part >= 1:
        return row
    dense_us = part * row["dense_us"]
    slower = row["median_us"] - dense_us > margin_us(dense_us, part * row["dense_mad_us"])
    return {**row, "dense_us": dense_us, "dense_peer": dense["peer"], "status": "failed" if slower else "ok"}


def formats(points: Iterable[Point]) -> list[str]:
    return sorted({name for point in points for name in point.formats})


def break_even(points: Sequence[Point]) -> list[BreakEven]:
    """Of every problem and format, in the order of ``points``; a format that was measured at other problems only is
    ``not measured`` at this one."""
    by_problem: dict[Problem, list[Point]] = defaultdict(list)
    for point in points:
        by_problem[point.problem].append(point)
    found, names = [], formats(points)
    for problem, here in by_problem.items():
        for format in names:
            missing = Outcome(NOT_MEASURED)
            verdicts = {point.tokens: point.formats.get(format, missing).text for point in here if point.dense}
            found.append(BreakEven(problem, here[0].roles, format, verdicts))
    return found


def timed(row: Row) -> bool:
    return row.get("status") == "ok" and bool(row.get("median_us"))


def best_dense_rung(rows: Iterable[Row]) -> Row | None:
    """The fastest rung of a ladder that runs the whole model dense and not quantized, in whatever dtype."""
    dense = [row for row in rows if timed(row) and rung_group(row) == "dense"]
    return min(dense, key=_median, default=None)


def rung_group(row: Row) -> str:
    """``dense``, ``library`` or ``own``, as ``group`` of the op sweep; a rung with a format is the package's own."""
    if "torchao" in row["peer"]:
        return "library"
    return "dense" if row.get("format") in (None, "", "dense") else "own"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lowest, median and highest."""
    return min(values), statistics.median(values), max(values)


def _point(problem: Problem, tokens: int, roles: tuple[str, ...], rows: list[Row]) -> Point:
    dense = min((row for row in rows if row["group"] == "dense" and timed(row)), key=_median, default=None)
    own: dict[str, list[Row]] = defaultdict(list)
    library: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        # A packed weight that is held dense is no format's kernel.
        if row["group"] == "own" and row.get("layout") != "dense":
            own[row["format"]].append(row)
        elif row["group"] == "library":
            library[row["peer"]].append(row)
    held = ({name: _outcome(found, dense) for name, found in sorted(group.items())} for group in (own, library))
    return Point(problem, tokens, roles, dense, *held)


def _outcome(rows: list[Row], dense: Row | None) -> Outcome:
    good = [row for row in rows if timed(row)]
    if not good:
        return Outcome(Counter(row.get("status") or NOT_MEASURED for row in rows).most_common(1)[0][0])
    if dense is None:
        return Outcome("no dense path", min(good, key=_median))
    # A time with launches in it and one without are of two things.
    alike = [row for row in good if row.get("mode") == dense.get("mode")]
    if not alike:
        return Outcome(OTHER_MODE, min(good, key=_median))
    row = min(alike, key=_median)
    gain, margin = dense["median_us"] - row["median_us"], margin_us(dense["median_us"], dense.get("mad_us") or 0.0)
    verdict = EQUAL if abs(gain) <= margin else FASTER if gain > 0 else SLOWER
    return Outcome(verdict, row, dense["median_us"] / row["median_us"])


def _median(row: Row) -> float:
    return float(row["median_us"])
