"""One page from the rows of a GPU check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsebert.bench import records
from sparsebert.bench.report import aims, compare, page, tables
from sparsebert.bench.report.tables import Table, number

Row = dict[str, Any]

_NAMES = ("commit", "date", "dirty", "torch", "triton", "transformers", "cuda", "driver", "cusparselt", "python")
# Of the op sweep's tables; the rows have all counts.
SHOWN = (32, 128, 512, 2048, 8192)
# What the CUDA kernels were written for: title -> activation, what it is held against, the kernel that does the same.
Against = dict[str, tuple[str, str, str]]
_ROWS, _24 = "int8+2:4_rows/{}/cuda/bf16", "2:4/{}/cuda/fp16"
MMA_SP: Against = {
    "fp16 over cuSPARSELt (target 0.9x)": ("none", "cusparselt_fp16", _24.format("mma_sp")),
    "int8 + GELU over cuBLAS bf16 + GELU (1.5x)": ("gelu", "cublas_bf16", _ROWS.format("mma_sp")),
    "over cuSPARSELt int8 + scales + GELU (1.2x)": ("gelu", "cusparselt_int8_scaled", _ROWS.format("mma_sp")),
    "with rank 32, x vᵀ given (0.95x)": ("none", _24.format("mma_sp"), "tail32+2:4/mma_sp/cuda/fp16"),
}
WGMMA: Against = {
    "bf16 over cuBLAS (target 1.25x from 4,096 on, FFN)": ("none", "cublas_bf16", "2:4/neutral/cuda/bf16"),
    "fp16 over cuSPARSELt (1x from 512 on)": ("none", "cusparselt_fp16", _24.format("neutral")),
    "fp16 over its dense twin": ("none", "dense/neutral/cuda/fp16", _24.format("neutral")),
    "dense fp16 over cuBLAS": ("none", "cublas_fp16", "dense/neutral/cuda/fp16"),
    "int8 + GELU over cuBLAS bf16 + GELU (2x from 2,048 on)": ("gelu", "cublas_bf16", _ROWS.format("neutral")),
    "dense int8 over _int_mm and its scales (1x)": ("none", "int_mm_bf16", "int8_rows/neutral/cuda/bf16"),
    "with LayerNorm in one launch, over two": (
        "none",
        "2:4_then_layer_norm/neutral/cuda/fp16",
        "2:4_layer_norm/neutral/cuda/fp16",
    ),
    "with rank 32, x vᵀ given": ("none", _24.format("neutral"), "tail32+2:4/neutral/cuda/fp16"),
}
AGAINST_NOTE = "The other's time over the kernel's: above 1 the kernel is faster; the last is what a tail leaves."
PEAKS_NOTE = "One instruction or transfer alone. 2:4 counts the dense product it stands for; of a chain, the gap alone."


def summary(rows: Sequence[Row]) -> str:
    """Markdown: where it ran, what each step came to, whether a tuned layer is slower than dense, ceilings and peaks,
    the 2:4 kernel and the fused encoder beside what they are held against, linears at a few token counts, models, what
    did not work and why.

    ``ValueError`` where times of a CPU come with the record of a GPU.
    """
    shown = [row for row in rows if row["kind"] != "linear" or row["dry"] or row["tokens"] in SHOWN]
    sections = [
        _head(rows),
        _section("Steps", "", _steps(rows)),
        tables.never_slower(rows),
        _section("Ceilings", "", tables.ceilings(rows)),
        peaks(rows),
        _section("The CUDA 2:4 kernel", AGAINST_NOTE, _against(rows, MMA_SP)),
        _section("The CUDA kernel for Hopper", AGAINST_NOTE, _against(rows, WGMMA)),
        _section("The fused encoder", aims.NOTE, aims.table(rows)),
        _section("Break-even", page.BREAK_EVEN_NOTE, tables.break_even(rows)),
        _section("Linear layers", page.OPS_NOTE, tables.ops(shown)),
        _section("Roofline", page.ROOFLINE_NOTE, tables.roofline(rows)),
        _section("Models end to end", page.LADDER_NOTE, tables.ladder(rows)),
        _section("Refused, wrong or crashed", "", tables.troubles(rows)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _against(rows: Sequence[Row], against: Against) -> Table:
    times = {
        (row["role"], row["tokens"], row["activation"], row["peer"]): row["median_us"]
        for row in compare.steadied(rows)
        if row["kind"] == "linear" and compare.timed(row)
    }
    lines = []
    for role, tokens in sorted({key[:2] for key in times}):
        cells = []
        for activation, other, own in against.values():
            found = [times.get((role, tokens, activation, peer)) for peer in (other, own)]
            cells.append(f"{found[0] / found[1]:.2f}x" if found[0] and found[1] else tables.NOTHING)
        if set(cells) != {tables.NOTHING}:
            lines.append((role, str(tokens), *cells))
    return Table(("layer", "tokens", *against), lines)


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
