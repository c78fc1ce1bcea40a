"""Synthetic rows of a run, as the benchmarks write them: what the tests of records and reports are fed. No number here
was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsebert.bench import records

Row = dict[str, Any]

RECORD: Row = {
    "sparsebert": "0.1.0",
    "commit": "0123456789abcdef",
    "date": "2020-01-01T00:00:00+00:00",
    "dirty": False,
    "measured": "2020-01-02T03:04:05+00:00",
    "cpu": "Test CPU",
    "cpu_threads": 2,
    "gpu": "Test GPU",
    "driver": "1.2",
    "torch": "2.0",
}
CPU_RECORD: Row = {**RECORD, "gpu": None, "driver": None}
OUT, IN = 3072, 768


def timing(median_us: float, mad_us: float = 0.0, mode: str = "cuda-graph") -> Row:
    return {"median_us": median_us, "mad_us": mad_us, "mode": mode, "repeats": 5}


def linear(peer: str, tokens: int, median_us: float | None, *, group: str = "dense", **change: Any) -> Row:
    """A row of the op sweep: 3072 x 768, fp16, no activation. Without a time its status is ``refused``."""
    shape = {"role": "base.ffn_in", "out_features": OUT, "in_features": IN, "tokens": tokens, "activation": "none"}
    row = {"kind": "linear", "peer": peer, "group": group, "model": "base", "dtype": "float16", **shape}
    row |= {"flops": 2 * tokens * OUT * IN, "operations": 2 * tokens * OUT * IN, "bytes": 2 * OUT * IN}
    if median_us is None:
        row |= {"status": "refused", "reason": "not on this GPU"}
    else:
        row |= {"status": "ok", **timing(median_us)}
    row |= change
    return {**row, "key": f"{row['role']} {tokens} {row['activation']} {row['dtype']} {row.get('layout')} {peer}"}


def own(tokens: int, median_us: float | None, *, format: str = "2:4", backend: str = "cuda", **change: Any) -> Row:
    """A row of this package: by default 2:4 in layout ``mma_sp``."""
    fields = {"op": f"nm_linear {format}", "layout": "mma_sp", "backend": backend, "configuration": {"tile": 1}}
    fields |= {"device": "Test GPU", "weight_dtype": "float16", "format": format} | change
    # What the packed weight has, which is the layer's unless columns are dropped.
    fields = {
        "op_out_features": fields.get("out_features", OUT),
        "op_in_features": fields.get("in_features", IN),
    } | fields
    return linear(f"{format}/{fields['layout']}/{backend}/fp16", tokens, median_us, group="own", **fields)


def model(peer: str, median_us: float, **change: Any) -> Row:
    """A row of the ladder: bert-base, 8 sequences of 128 tokens."""
    row = {"kind": "model", "peer": peer, "model": "bert-base", "batch": 8, "length": 128, "lengths": "full"}
    row |= {"tokens": 1024, "padded_tokens": 0, "dtype": "float16", "format": None, "status": "ok", "model_bytes": 2e8}
    row |= {**timing(median_us), "p95_us": 2 * median_us, "p99_us": 3 * median_us, "peak_bytes": 3e8}
    row |= {"sequences_per_s": 8e6 / median_us, "tokens_per_s": 1024e6 / median_us}
    return {**row, "key": f"bert-base 8x128 full {peer}", **change}


def lines(rows: list[Row], record: Row = RECORD, *, dry: bool = False) -> str:
    name = records.identity(record)
    every = [{"kind": "environment", "record": record}, *rows]
    return "".join(json.dumps({"dry": dry, "environment": name, "at_s": 0.0, **row}) + "\n" for row in every)


def run_file(path: Path, rows: list[Row], record: Row = RECORD, *, dry: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(rows, record, dry=dry), encoding="utf-8")
    return path
