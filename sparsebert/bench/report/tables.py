"""Rows as tables. A cell without a number says why: ``refused``, ``wrong``, or ``-`` where nobody measured."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sparsebert.bench.models.published import PublishedLine
from sparsebert.bench.report import compare

Row = dict[str, Any]
NOTHING = "-"


class Table(NamedTuple):
    titles: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        """Empty where there is no line."""
        if not self.lines:
            return ""
        cells = [[cell.replace("|", "/") for cell in line] for line in (self.titles, *self.lines)]
        head, *body = ("| " + " | ".join(line) + " |" for line in cells)
        return "\n".join([head, "|" + " --- |" * len(self.titles), *body])


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits, without an exponent."""
    if value is None:
        return NOTHING
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def ratio(value: float) -> str:
    """Two decimals, or as many as show that it is not zero."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def ops(rows: Iterable[Row]) -> Table:
    """For each layer, dtype, activation and token count the best dense path, and how many times as fast each format
    (with its fastest backend) and each library peer is."""
    found = compare.points(rows)
    formats = compare.formats(found)
    peers = sorted({name for point in found for name in point.library})
    lines = []
    for point in found:
        dense = point.dense
        best = (dense["peer"], number(dense["median_us"])) if dense else (NOTHING, NOTHING)
        own = (_speed_up(point.formats.get(name), backend=True) for name in formats)
        beside = (_speed_up(point.library.get(name)) for name in peers)
        lines.append((point.name, str(point.tokens), *best, *own, *beside))
    return Table(("layer", "tokens", "best dense path", "us", *formats, *peers), lines)


def fastest(rows: Iterable[Row]) -> Table:
    """For each layer, dtype, activation and token count the best dense path and the fastest format beside it."""
    lines = []
    for point in compare.points(rows):
        dense = point.dense
        best = (dense["peer"], number(dense["median_us"])) if dense else (NOTHING, NOTHING)
        timed = {name: outcome for name, outcome in point.formats.items() if outcome.speed_up is not None}
        name = max(timed, key=lambda name: timed[name].speed_up or 0.0, default=NOTHING)
        outcome = timed.get(name)
        kernel = f"{outcome.row['layout']}, {outcome.row['backend']}" if outcome and outcome.row else NOTHING
        lines.append((point.name, str(point.tokens), *best, name, kernel, _speed_up(outcome)))
    return Table(("layer", "tokens", "best dense path", "us", "fastest format", "by", "over dense"), lines)


def break_even(rows: Iterable[Row], *, plainest: bool = False) -> Table:
    """For each layer and format the token counts at which the format beats the best dense path. ``from 512 up`` reaches
    to the largest count measured, which the second column has. ``plainest``: of one activation and dtype alone, none
    and fp16 where these were measured."""
    found = compare.points(rows)
    if plainest and found:
        found = compare.of_variant(found, compare.variants(found)[0])
    formats = compare.formats(found)
    by_problem: dict[compare.Problem, list[compare.BreakEven]] = defaultdict(list)
    for entry in compare.break_even(found):
        by_problem[entry.problem].append(entry)
    lines = []
    for entries in by_problem.values():
        counts = entries[0].verdicts
        over = f"{min(counts)} to {max(counts)}" if counts else compare.NOT_MEASURED
        name = compare.name_of(entries[0].problem, entries[0].roles)
        lines.append((name, over, *(str(entry) for entry in entries)))
    return Table(("layer", "counts measured", *formats), lines)


def roofline(rows: Iterable[Row]) -> Table:
    """Of each peer how much of what the measured ceilings allow it reaches: floor time over its own, over all shapes
    and token counts it was measured at."""
    reached: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "linear" and compare.timed(row) and row.get("reached") is not None:
            reached[row.get("group") or NOTHING, row["peer"]].append(row)
    lines = []
    for (group, peer), of in sorted(reached.items()):
        best = max(of, key=lambda row: row["reached"])
        shares = (f"{100 * value:.0f} %" for value in compare.spread([row["reached"] for row in of]))
        lines.append((peer, group, str(len(of)), *shares, f"{best['role']} at {best['tokens']} tokens"))
    return Table(("peer", "group", "measured", "lowest", "median", "highest", "highest of"), lines)


def ladder(rows: Iterable[Row], published: Iterable[PublishedLine] = ()) -> Table:
    """Models end to end, rung by rung, and how many times as fast each is as the best dense rung at the same input.
    Published figures stand below those of their model, with hardware and source and without a ratio: they are of other
    machines."""
    ladders = by_input(rows)
    others = list(published)
    lines = []
    for (model, batch, length, lengths), rungs in ladders.items():
        dense = compare.best_dense_rung(rungs)
        for row in rungs:
            where = (model, f"{batch} x {length}, {lengths}" if lengths else f"{batch} x {length}")
            lines.append((*where, row["peer"], *_rung(row, dense)))
        for line in matching(others, model, batch, length):
            others.remove(line)
            lines.append(_published(line))
    models = {model for model, *_ in ladders}
    lines += (_published(line) for line in others if line.model in models)
    titles = ("model", "batch x length", "rung", "p50 ms", "p95 ms", "p99 ms", "sequences/s", "tokens/s")
    return Table((*titles, "peak MB", "model MB", "over the best dense"), lines)


def by_input(rows: Iterable[Row]) -> dict[tuple[str, int, int, str], list[Row]]:
    """The ``model`` rows by model, batch, length and kind of lengths, in that order; times are ``steadied``."""
    found: dict[tuple[str, int, int, str], list[Row]] = defaultdict(list)
    for row in compare.steadied(rows):
        if row["kind"] == "model":
            found[row["model"], row["batch"], row["length"], row.get("lengths") or ""].append(row)
    return dict(sorted(found.items()))


def matching(published: Iterable[PublishedLine], model: str, batch: int, length: int) -> list[PublishedLine]:
    return [line for line in published if (line.model, line.batch, line.length) == (model, batch, length)]


def ceilings(rows: Iterable[Row]) -> Table:
    lines = []
    for row in rows:
        if row["kind"] == "ceiling" and row.get("status") == "ok":
            rate = f"{number(row['tflops'], 4)} T/s" if row.get("tflops") else ""
            rate = f"{number(row['gbps'], 4)} GB/s" if row.get("gbps") else rate
            lines.append((row["peer"], number(row.get("median_us")), rate or NOTHING))
    return Table(("what", "us", "rate"), lines)


def troubles(rows: Iterable[Row]) -> Table:
    """What was refused, wrong or crashed, and why; ``failed``, a layer that is slower, is not among it."""
    counts = Counter(
        (row["peer"], row["status"], row.get("reason") or "")
        for row in rows
        if row.get("peer") and row.get("status") not in (None, "ok", "skipped", "failed")
    )
    lines = [(peer, status, str(count), reason) for (peer, status, reason), count in counts.items()]
    return Table(("peer", "status", "rows", "reason"), lines)


def never_slower(rows: Iterable[Row]) -> str:
    """The layers of tuned plans that are slower than the best dense path, or one line saying how many were checked;
    empty where none was."""
    checked = compare.never_slower(rows)
    failed = [row for row in checked if row.get("status") == "failed"]
    without = [row for row in checked if row.get("status") not in ("ok", "failed")]
    if not checked:
        return ""
    if len(without) == len(checked):
        return f"None of {len(checked)} layers of tuned plans could be checked."
    count = len(checked) - len(without)
    layers = f"{count} layer{'' if count == 1 else 's'} of tuned plans"
    more = f" {len(without)} could not be measured." if without else ""
    limit = "slower than the best dense path by more than max(2 %, 3 MAD)"
    if not failed:
        return f"{layers} checked: none is {limit}.{more}"
    head = f"Of {layers} these are {limit}:{more}"
    return "\n".join([head, "", *(f"- {_failure(row)}" for row in failed)])


def _failure(row: Row) -> str:
    sizes = f"{row.get('role') or 'layer'} {row['out_features']} x {row['in_features']} at {row['tokens']} tokens"
    times = f"{number(row['median_us'])} us, {row['dense_peer']} {number(row['dense_us'])} us"
    share = ratio(row["median_us"] / row["dense_us"])
    return f"{row.get('format') or row['peer']}, {sizes}: held as {row['layout']} {times} ({share} of its time)"


def _speed_up(outcome: compare.Outcome | None, *, backend: bool = False) -> str:
    if outcome is None:
        return NOTHING
    if outcome.speed_up is None:
        return outcome.text
    by = f" {outcome.row['backend']}" if backend and outcome.row and outcome.row.get("backend") else ""
    return f"{ratio(outcome.speed_up)}x{by}"


def _rung(row: Row, dense: Row | None) -> tuple[str, ...]:
    if not compare.timed(row):
        return (row.get("status") or NOTHING, *[NOTHING] * 7)
    ms = (number(_scaled(row, name, 1e3)) for name in ("median_us", "p95_us", "p99_us"))
    rates = (number(_scaled(row, name, 1)) for name in ("sequences_per_s", "tokens_per_s"))
    sizes = (number(_scaled(row, name, 1e6)) for name in ("peak_bytes", "model_bytes"))
    over = NOTHING if dense is None else f"{ratio(dense['median_us'] / row['median_us'])}x"
    return (*ms, *rates, *sizes, "best dense" if row is dense else over)


def published_name(line: PublishedLine) -> str:
    """Marked as published, with what ran and on what."""
    what = ", ".join(filter(None, (line.label.removeprefix("published: "), line.precision)))
    return f"published: {what}, on {line.hardware}"


def _published(line: PublishedLine) -> tuple[str, ...]:
    where = f"{line.batch} x {line.length}" if line.batch and line.length else "not said"
    name = f"{published_name(line)}, not measured here: {line.source}"
    times = (number(line.milliseconds), NOTHING, NOTHING, number(line.samples_per_s))
    return (line.model, where, name, *times, *[NOTHING] * 4)


def _scaled(row: Row, name: str, unit: float) -> float | None:
    value = row.get(name)
    return None if value is None else value / unit
