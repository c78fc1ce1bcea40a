"""One page from the rows of a GPU check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsebert.bench import records
from sparsebert.bench.report import page, tables
from sparsebert.bench.report.tables import Table, number

Row = dict[str, Any]

_NAMES = ("commit", "date", "dirty", "torch", "triton", "transformers", "cuda", "driver", "cusparselt", "python")
PEAKS_NOTE = "One instruction or transfer alone. 2:4 counts the dense product it stands for; of a chain, the gap alone."


def summary(rows: Sequence[Row]) -> str:
    """Markdown: where it ran, what each step came to, ceilings, peaks, linears, models, and what did not work and why.

    ``ValueError`` where times of a CPU come with the record of a GPU.
    """
    sections = [
        _head(rows),
        _section("Steps", "", _steps(rows)),
        _section("Ceilings", "", tables.ceilings(rows)),
        peaks(rows),
        _section("Linear layers", page.OPS_NOTE, tables.ops(rows)),
        _section("Break-even", page.BREAK_EVEN_NOTE, tables.break_even(rows)),
        _section("Roofline", page.ROOFLINE_NOTE, tables.roofline(rows)),
        _section("Models end to end", page.LADDER_NOTE, tables.ladder(rows)),
        tables.never_slower(rows),
        _section("Refused, wrong or crashed", "", tables.troubles(rows)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def peaks(rows: Sequence[Row]) -> str:
    """What each instruction and transfer reaches alone; in a dry run, what there would be to measure."""
    lines = []
    for row in rows:
        if row["kind"] != "peak" or (row["status"] != "ok" and not row["dry"]):
            continue
        rate = f"{number(row.get('median_us'))} us"
        if "tflops" in row:
            rate = f"{number(row['tflops'], 4)} T/s"
        elif "gbps" in row:
            rate = f"{number(row['gbps'], 4)} GB/s, {number(row['bytes_per_cycle'])} B a cycle and SM"
        ratios = (f"{row[key]:.2f}x" if row.get(key) else tables.NOTHING for key in ("of_dense", "of_best_dense"))
        rate = rate if row["status"] == "ok" else tables.NOTHING
        lines.append((row["what"], rate, number(row.get("cycles"), 4), number(row.get("mhz"), 4), *ratios))
    titles = ("what", "rate", "cycles", "MHz", "of its dense twin", "of the best dense")
    return _section("Peaks", PEAKS_NOTE, Table(titles, lines))


def _head(rows: Sequence[Row]) -> str:
    record: Row = next((row["record"] for row in rows if row["kind"] == "environment"), {})
    # A name that can be taken for a GPU's stands above figures of that GPU alone.
    lines = [f"# GPU check: {records.heading(record, rows)}"]
    if any(row["dry"] for row in rows):
        lines.append(page.DRY_NOTE)
    elif record and not record.get("gpu"):
        lines.append(page.CPU_NOTE)
    lines.append(", ".join(f"{name} {record[name]}" for name in _NAMES if record.get(name) is not None))
    return "\n\n".join(lines)


def _steps(rows: Sequence[Row]) -> Table:
    steps = [row for row in rows if row["kind"] == "step"]
    lines = [(row["step"], row["status"], f"{row['seconds']:.1f}", row["reason"]) for row in steps]
    return Table(("step", "status", "s", "note"), lines)


def _section(title: str, note: str, table: Table) -> str:
    if not table.lines:
        return ""
    return "\n\n".join(part for part in (f"## {title}", note, table.markdown()) if part)
