"""One page from the rows of a GPU check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

BASELINE = "cublas_fp16"
# Column title -> peer; the ratio shown is the baseline's time over the peer's.
RATIOS = {
    "2:4 fp16": "cusparselt_fp16",
    "2:4 CUDA": "cuda_nm24_fp16",
    "int8 2:4 CUDA": "cuda_int8_nm24",
    "2:4 Triton": "triton_nm24_fp16",
    "1:4 Triton": "triton_nm14_fp16",
    "2:8 Triton": "triton_nm28_fp16",
    "bitmap 5 % Triton": "triton_bitmap05_fp16",
    "low rank + rows Triton": "triton_low_rank_rows_fp16",
    "int8 Triton": "triton_int8_fp16",
    "2:4 int8": "cusparselt_int8",
    "2:4 fp8": "cusparselt_fp8",
    "2:4 CUTLASS": "cutlass_fp16",
    "int8": "int_mm",
    "fp8": "fp8_tensor",
}
# What the CUDA 2:4 kernel is held against: column title -> the peer, and the kernel that does the same.
AGAINST = {
    "2:4 fp16 over cuSPARSELt": ("cusparselt_fp16", "cuda_nm24_fp16"),
    "int8 2:4 + GELU over cuBLAS bf16 + GELU": ("cublas_bf16_gelu", "cuda_int8_nm24_gelu"),
    "over cuSPARSELt int8 + scales + GELU": ("cusparselt_int8_gelu", "cuda_int8_nm24_gelu"),
    "with rank 32": ("cuda_nm24_fp16", "cuda_low_rank32_nm24_fp16"),
    "with rank 32, x vᵀ given": ("cuda_nm24_fp16", "cuda_tail32_nm24_fp16"),
}
MODES = ("eager", "graph", "compiled")


def summary(rows: Sequence[Row]) -> str:
    """Markdown: where it ran, what each step came to, ceilings, peaks, linears, the CUDA kernel beside what it is held
    against, models, and what did not work and why."""
    measured = [_ceilings(rows), peaks(rows), _linears(rows), _against(rows), _models(rows)]
    sections = [_head(rows), _steps(rows), *measured, _troubles(rows)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _of(rows: Sequence[Row], kind: str, status: str = "") -> list[Row]:
    return [row for row in rows if row["kind"] == kind and (not status or row.get("status") == status)]


def _table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles), *body])


def _number(value: float | None, digits: int = 3) -> str:
    """A few significant digits, without an exponent."""
    if value is None:
        return "-"
    if value >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def _head(rows: Sequence[Row]) -> str:
    records = [row["record"] for row in _of(rows, "environment")]
    record = records[0] if records else {}
    lines = [f"# GPU check: {record.get('gpu') or record.get('cpu') or 'environment not recorded'}"]
    if any(row["dry"] for row in rows):
        lines.append("**Dry run** at toy sizes on a CPU: the numbers below mean nothing.")
    names = (
        "commit",
        "date",
        "dirty",
        "torch",
        "triton",
        "transformers",
        "cuda",
        "driver",
        "cusparselt",
        "python",
    )
    lines.append(", ".join(f"{name} {record[name]}" for name in names if record.get(name) is not None))
    return "\n\n".join(lines)


def _steps(rows: Sequence[Row]) -> str:
    lines = [
        (row["step"], row["status"], f"{row['seconds']:.1f}", row["reason"].replace("|", "/"))
        for row in _of(rows, "step")
    ]
    return "## Steps\n\n" + _table(("step", "status", "s", "note"), lines)


def _ceilings(rows: Sequence[Row]) -> str:
    lines = []
    for row in _of(rows, "ceiling", "ok"):
        rate = f"{_number(row['tflops'], 4)} T/s" if "tflops" in row else ""
        rate = f"{_number(row['gbps'], 4)} GB/s" if "gbps" in row else rate
        lines.append((row["peer"], _number(row["median_us"]), rate))
    return "## Ceilings\n\n" + _table(("what", "us", "rate"), lines) if lines else ""


def peaks(rows: Sequence[Row]) -> str:
    """What each instruction and transfer reaches alone; in a dry run, what there would be to measure."""
    lines = []
    for row in _of(rows, "peak"):
        if row["status"] != "ok" and not row["dry"]:
            continue
        rate = f"{_number(row.get('median_us'))} us"
        if "tflops" in row:
            rate = f"{_number(row['tflops'], 4)} T/s"
        elif "gbps" in row:
            rate = f"{_number(row['gbps'], 4)} GB/s, {_number(row['bytes_per_cycle'])} B a cycle and SM"
        ratios = (f"{row[key]:.2f}x" if row.get(key) else "-" for key in ("of_dense", "of_best_dense"))
        rate = rate if row["status"] == "ok" else "-"
        lines.append((row["what"], rate, _number(row.get("cycles"), 4), _number(row.get("mhz"), 4), *ratios))
    if not lines:
        return ""
    text = "One instruction or transfer alone. 2:4 counts the dense product it stands for; of a chain, the gap alone."
    titles = ("what", "rate", "cycles", "MHz", "of its dense twin", "of the best dense")
    return f"## Peaks\n\n{text}\n\n" + _table(titles, lines)


def _floor_us(row: Row, rows: Sequence[Row]) -> float | None:
    """The larger of bytes over copy bandwidth and operations over the fp16 rate, both as measured here."""
    found = {ceiling["peer"]: ceiling for ceiling in _of(rows, "ceiling", "ok")}
    if "copy" not in found or "matmul_fp16" not in found:
        return None
    return max(row["bytes"] / found["copy"]["gbps"] / 1e3, row["flops"] / found["matmul_fp16"]["tflops"] / 1e6)


def _linears(rows: Sequence[Row]) -> str:
    times = {(r["role"], r["tokens"], r["peer"]): r for r in _of(rows, "linear", "ok")}
    lines = []
    for role, tokens in sorted({key[:2] for key in times}):
        dense = times.get((role, tokens, BASELINE))
        # One page: every token count for the feed-forward layers, the telling ones for the others.
        if dense is None or (".ffn" not in role and tokens not in (128, 2048, 8192)):
            continue
        ratios = []
        for peer in RATIOS.values():
            other = times.get((role, tokens, peer))
            ratios.append(f"{dense['median_us'] / other['median_us']:.2f}x" if other else "-")
        shape = f"{dense['out_features']}x{dense['in_features']}"
        floor = _number(_floor_us(dense, rows))
        lines.append((role, shape, str(tokens), _number(dense["median_us"]), floor, *ratios))
    if not lines:
        return ""
    titles = ("layer", "shape", "tokens", "dense fp16 us", "floor us", *RATIOS)
    text = "CUDA-graph replay, weights out of cache. A ratio is dense fp16 time over the peer's: above 1, faster."
    return f"## Linear layers\n\n{text}\n\n" + _table(titles, lines)


def _against(rows: Sequence[Row]) -> str:
    times = {(r["role"], r["tokens"], r["peer"]): r for r in _of(rows, "linear", "ok")}
    own = {peer for _, peer in AGAINST.values()}
    lines = []
    for role, tokens in sorted({key[:2] for key in times if key[2] in own}):
        ratios = []
        for pair in AGAINST.values():
            other, ours = (times.get((role, tokens, peer)) for peer in pair)
            known = other and ours and "median_us" in other and "median_us" in ours
            ratios.append(f"{other['median_us'] / ours['median_us']:.2f}x" if other and ours and known else "-")
        row = times.get((role, tokens, "cuda_nm24_fp16"), {})
        lines.append((role, str(tokens), _number(row.get("median_us")), row.get("algorithm") or "-", *ratios))
    if not lines:
        return ""
    titles = ("layer", "tokens", "2:4 fp16 us", "its configuration", *AGAINST)
    text = (
        "A ratio is the other's time over the kernel's: above 1, the kernel is faster. The last two say how much of "
        "its speed a low-rank part leaves: 0.95x is 5 % more time."
    )
    return f"## The CUDA 2:4 kernel\n\n{text}\n\n" + _table(titles, lines)


def _models(rows: Sequence[Row]) -> str:
    times = {(r["model"], r["batch"], r["length"], r["peer"]): r for r in _of(rows, "model", "ok")}
    lines = []
    for model, batch, length in sorted({key[:3] for key in times}):
        cells = []
        for mode in MODES:
            row = times.get((model, batch, length, f"dense_{mode}"))
            cells.append(_number(row["median_us"] / 1e3) if row else "-")
        lines.append((model, f"{batch}x{length}", *cells))
    if not lines:
        return ""
    return "## BERT end to end, dense fp16, ms\n\n" + _table(("model", "batch x tokens", *MODES), lines)


def _troubles(rows: Sequence[Row]) -> str:
    counts = Counter(
        (row["peer"], row["status"], row.get("reason", ""))
        for row in rows
        if row.get("peer") and row.get("status") not in ("ok", "skipped")
    )
    if not counts:
        return ""
    lines = [(peer, status, str(count), reason.replace("|", "/")) for (peer, status, reason), count in counts.items()]
    return "## Refused, wrong or crashed\n\n" + _table(("peer", "status", "rows", "reason"), lines)
