"""What the fused encoder was built to reach, beside what was reached."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from sparsebert.bench.models.published import LINES
from sparsebert.bench.report import compare
from sparsebert.bench.report.tables import Table, number

Row = dict[str, Any]


class Aim(NamedTuple):
    """On an input the fastest of ``rungs`` takes ``1 / at_least`` of the fastest of ``against``, or less."""

    model: str
    batch: int
    length: int
    lengths: str
    rungs: tuple[str, ...]
    against: tuple[str, ...]
    at_least: float


_COMPILED = ("compiled_fp16", "compiled_max_fp16")
AIMS = (
    Aim("bert-base", 1, 128, "full", ("fused_fp16",), ("compiled_fp16",), 1.3),
    Aim("bert-base", 32, 128, "glue", ("fused_fp16",), _COMPILED, 2.0),
    Aim(
        "bert-base",
        32,
        128,
        "glue",
        ("fused_int8", "fused_int8-static", "fused_mixed", "fused_int8+2:4/mma_sp"),
        ("fused_fp16",),
        1.5,
    ),
    *(
        Aim(model, batch, 128, "glue", ("eager_fused_fp32",), ("eager_fp32",), 1.5)
        for model in ("minilm", "bert-base")
        for batch in (1, 8, 32)
    ),
)
NOTE = "The other's time over the fused encoder's; of a published line, samples a second over those of other hardware."


def table(rows: Iterable[Row]) -> Table:
    """A line for each aim that the rows of a run have both sides of; ``steadied`` times."""
    steady = [row for row in compare.steadied(list(rows)) if row["kind"] == "model" and compare.timed(row)]
    lines = []
    for aim in AIMS:
        cell = [row for row in steady if (row["model"], row["batch"], row["length"], row["lengths"]) == aim[:4]]
        ours, theirs = (_fastest(cell, names) for names in (aim.rungs, aim.against))
        if ours and theirs:
            ratio = theirs["median_us"] / ours["median_us"]
            where = f"{aim.batch} x {aim.length}, {aim.lengths}"
            lines.append((aim.model, where, ours["peer"], theirs["peer"], *_judged(ratio, aim.at_least)))
    fused = [
        row
        for row in steady
        if (row["model"], row["lengths"]) == ("bert-large", "squad") and row["peer"].startswith("fused_")
    ]
    published = next(one for one in LINES if one.model == "bert-large" and one.samples_per_s)
    if fused:
        best = max(fused, key=lambda row: row["sequences_per_s"])
        where = f"{best['batch']} x {best['length']}, squad"
        ratio = best["sequences_per_s"] / float(published.samples_per_s or 0)
        line = f"{number(published.samples_per_s)} samples/s on {published.hardware}, {published.label}"
        lines.append((best["model"], where, best["peer"], line, *_judged(ratio, 1.0)))
    return Table(("model", "batch x length", "fused", "against", "reached", "aim", ""), lines)


def _fastest(rows: Iterable[Row], names: tuple[str, ...]) -> Row | None:
    return min((row for row in rows if row["peer"] in names), key=lambda row: row["median_us"], default=None)


def _judged(ratio: float, at_least: float) -> tuple[str, str, str]:
    return f"{ratio:.2f}x", f"{at_least:g}x", "met" if ratio >= at_least else "missed"
