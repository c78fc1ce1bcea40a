"""The one table of measured choices: times of (device, op, layout, sizes, token bucket, dtype), kept as JSON.

``sb.tune`` writes it to ``$SPARSEBERT_CACHE/measurements.json`` (default ``~/.cache/sparsebert``); layouts are chosen
from it when a module is prepared. A row is one measurement on one device and counts nowhere else.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from sparsebert.ops.layouts import Spec

TABLE_VERSION = 1
ENVIRONMENT_VARIABLE = "SPARSEBERT_CACHE"
# A packed layout this little slower than dense counts as equal and is kept, being smaller.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Row:
    """One measurement: median and median absolute deviation in microseconds of one call of ``op`` in ``layout``."""

    device: str
    op: str
    layout: str
    out_features: int
    in_features: int
    tokens: int
    dtype: str
    median_us: float
    mad_us: float
    backend: str
    source: str = "measured"

    @property
    def key(self) -> tuple[str, str, str, int, int, int, str]:
        return (
            self.device,
            self.op,
            self.layout,
            self.out_features,
            self.in_features,
            token_bucket(self.tokens),
            self.dtype,
        )


class Fastest(NamedTuple):
    layout: str
    reason: str


def token_bucket(tokens: int) -> int:
    """The power of two at or above ``tokens``."""
    return 1 << max(0, tokens - 1).bit_length()


def op_name(spec: Spec) -> str:
    """The op with its pattern, as rows name it: ``nm_linear 2:4``."""
    return f"nm_linear {spec.n}:{spec.m}"


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """Name of the hardware that a measurement holds for."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {_cpu_model()}" if device.type == "cpu" else device.type


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()


def path() -> Path:
    root = os.environ.get(ENVIRONMENT_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "sparsebert") / "measurements.json"


def load() -> list[Row]:
    """All rows; none where there is no table. A table that cannot be read is an error naming the file."""
    file = path()
    try:
        stamp = file.stat().st_mtime_ns
    except OSError:
        return []
    return list(_read(file, stamp))


@lru_cache(maxsize=4)
def _read(file: Path, stamp: int) -> tuple[Row, ...]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["version"] != TABLE_VERSION:
            raise ValueError(f"version is {data['version']!r}, expected {TABLE_VERSION}")
        return tuple(Row(**row) for row in data["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a table of measurements ({error}); delete it and tune again") from error


def record(rows: Iterable[Row]) -> Path:
    """Merges rows into the table, newer ones replacing those of the same key, in one atomic step."""
    merged = {row.key: row for row in load()}
    merged.update({row.key: row for row in rows})
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    ordered = [asdict(merged[key]) for key in sorted(merged)]
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False, encoding="utf-8") as out:
        json.dump({"version": TABLE_VERSION, "rows": ordered}, out, indent=1)
        out.write("\n")
    os.replace(out.name, file)
    return file


def rows_for(spec: Spec, dtype: torch.dtype, device: torch.device) -> list[Row]:
    """Rows that hold for this weight on this device."""
    key = (device_name(device), op_name(spec), spec.out_features, spec.in_features, _dtype_name(dtype))
    return [r for r in load() if (r.device, r.op, r.out_features, r.in_features, r.dtype) == key]


def make_row(
    spec: Spec,
    layout: str,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    median_us: float,
    mad_us: float,
    backend: str,
) -> Row:
    return Row(
        device_name(device),
        op_name(spec),
        layout,
        spec.out_features,
        spec.in_features,
        token_bucket(tokens),
        _dtype_name(dtype),
        round(median_us, 3),
        round(mad_us, 3),
        backend,
    )


def fastest_layout(spec: Spec, dtype: torch.dtype, device: torch.device) -> Fastest | None:
    """The layout of least total time over the token counts measured, or None where dense was not measured.

    A packed layout within max(2 %, 3 MAD) of the best is preferred to ``dense``, being smaller.
    """
    by_layout: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows_for(spec, dtype, device):
        by_layout[row.layout][row.tokens] = row
    dense = by_layout.get("dense")
    if not dense:
        return None
    totals = {
        layout: sum(rows[t].median_us for t in dense)
        for layout, rows in by_layout.items()
        if rows.keys() >= dense.keys()
    }
    noise = max(TOLERANCE * totals["dense"], 3 * sum(row.mad_us for row in dense.values()))
    winner = min(totals, key=lambda layout: (totals[layout] - (0 if layout == "dense" else noise), layout))
    at = ", ".join(str(t) for t in sorted(dense))
    packed = {layout: total for layout, total in totals.items() if layout != "dense"}
    if not packed:
        return Fastest("dense", f"only dense was measured, at {at} tokens")
    rival = min(packed, key=lambda layout: packed[layout]) if winner == "dense" else winner
    return Fastest(
        winner,
        f"measured at {at} tokens: {rival} takes {totals[rival] / totals['dense']:.2f} of the time of dense",
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
