"""The tables of measured choices: times of (device, op, layout, sizes, token bucket, dtype), kept as JSON.

``sb.tune`` writes the user's own to ``$SPARSEBERT_CACHE/measurements.json`` (default ``~/.cache/sparsebert``); below it
stands ``shipped.json``, which comes with the package. Layouts are chosen from them when a module is prepared, and
kernels with their configurations when they first run. A row is one measurement on one device and counts nowhere else.

Layouts are compared with each other, so all rows of one weight come from one table: a weight that was tuned here, at
whatever token counts, is chosen for by what was measured here alone. The kernel of a layout that is held compares with
nothing: a row of the shipped table serves where the user's has none of its key.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparsebert.ops.devices import Device, describe
from sparsebert.ops.specs import Spec

TABLE_VERSION = 1
ENVIRONMENT_VARIABLE = "SPARSEBERT_CACHE"
SHIPPED_TABLE = Path(__file__).with_name("shipped.json")
# What ``source`` says, and with it ``explain`` and the reasons of a choice.
MEASURED, SHIPPED = "measured", "measured (shipped)"
_generation = 0
# A packed layout this little slower than dense counts as equal and is kept, being smaller.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Row:
    """One measurement: median and median absolute deviation in microseconds of one call of ``op`` in ``layout``, by the
    quickest of its backends in the quickest ``configuration`` (empty where there is nothing to configure).
    ``source`` is ``MEASURED`` (by this user) or ``SHIPPED``."""

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
    source: str = MEASURED
    configuration: dict[str, int] = field(default_factory=dict)

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
    return f"{spec.op} {spec.label}"


def path() -> Path:
    root = os.environ.get(ENVIRONMENT_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "sparsebert") / "measurements.json"


def load() -> list[Row]:
    """All rows of the user's table; none where there is none. One that cannot be read is an error naming the file."""
    return list(_table().rows)


def shipped() -> list[Row]:
    """All rows that came with the package; a table that cannot be read is an error naming the file."""
    return list(_shipped(SHIPPED_TABLE).rows)


def of(spec: Spec, layout: str, dtype: torch.dtype, device: Device, tokens: int) -> Row | None:
    """The row of one problem, the user's before the shipped one; None where it was not measured."""
    sizes = (spec.out_features, spec.in_features, token_bucket(tokens))
    key = (device.name, op_name(spec), layout, *sizes, _dtype_name(dtype))
    return _table().by_key.get(key) or _shipped(SHIPPED_TABLE).by_key.get(key)


class _Table(NamedTuple):
    rows: tuple[Row, ...]
    by_key: dict[tuple[Any, ...], Row]
    by_weight: dict[tuple[Any, ...], list[Row]]


def _table() -> _Table:
    file = path()
    try:
        stamp = file.stat().st_mtime_ns
    except OSError:
        return _indexed(())
    return _own(file, stamp)


@lru_cache(maxsize=4)
def _own(file: Path, stamp: int) -> _Table:
    return _indexed(_read(file, "delete it and tune again"))


@lru_cache(maxsize=1)
def _shipped(file: Path) -> _Table:
    # No time stamp: it changes with the package alone.
    return _indexed(_read(file, "install sparsebert again"))


def _read(file: Path, remedy: str) -> tuple[Row, ...]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["version"] != TABLE_VERSION:
            raise ValueError(f"version is {data['version']!r}, expected {TABLE_VERSION}")
        return tuple(Row(**row) for row in data["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a table of measurements ({error}); {remedy}") from error


def _indexed(rows: tuple[Row, ...]) -> _Table:
    by_weight: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        by_weight[row.device, row.op, row.out_features, row.in_features, row.dtype].append(row)
    return _Table(rows, {row.key: row for row in rows}, dict(by_weight))


def record(rows: Iterable[Row]) -> Path:
    """Merges rows into the table, newer ones replacing those of the same key, in one atomic step."""
    merged = {row.key: row for row in load()}
    merged.update({row.key: row for row in rows})
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False, encoding="utf-8") as out:
        out.write(as_text(merged.values()))
    os.replace(out.name, file)
    global _generation
    _generation += 1
    return file


def as_text(rows: Iterable[Row]) -> str:
    """A table as its file holds it, in the order of keys."""
    ordered = [asdict(row) for row in sorted(rows, key=lambda row: row.key)]
    return json.dumps({"version": TABLE_VERSION, "rows": ordered}, indent=1) + "\n"


def generation() -> int:
    """Counts what this process recorded: a choice made from the table holds for one generation."""
    return _generation


def rows_for(spec: Spec, dtype: torch.dtype, device: torch.device) -> list[Row]:
    """Rows that hold for this weight on this device: the user's, or the shipped ones where the user has none."""
    weight = (describe(device).name, op_name(spec), spec.out_features, spec.in_features, _dtype_name(dtype))
    return _table().by_weight.get(weight) or _shipped(SHIPPED_TABLE).by_weight.get(weight, [])


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
    configuration: dict[str, int] | None = None,
) -> Row:
    return Row(
        describe(device).name,
        op_name(spec),
        layout,
        spec.out_features,
        spec.in_features,
        token_bucket(tokens),
        _dtype_name(dtype),
        round(median_us, 3),
        round(mad_us, 3),
        backend,
        configuration=configuration or {},
    )


def fastest_layout(spec: Spec, dtype: torch.dtype, device: torch.device) -> Fastest | None:
    """The layout to hold by what was measured, or None where dense was not.

    A packed layout qualifies where, at every token count that dense was measured at, it is not slower by more than
    max(2 %, 3 MAD). The quickest that qualifies is held; being smaller, it goes before dense within that margin.
    """
    by_layout: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows_for(spec, dtype, device):
        by_layout[row.layout][row.tokens] = row
    dense = by_layout.pop("dense", None)
    if not dense:
        return None
    # All of one table, as all rows of a weight are.
    measured = f"{next(iter(dense.values())).source} at {', '.join(str(t) for t in sorted(dense))} tokens"
    rivals = {layout: rows for layout, rows in by_layout.items() if rows.keys() >= dense.keys()}
    if not rivals:
        return Fastest("dense", f"{measured}: only dense")
    slowest = {layout: max(_excess(rows[t], dense[t]) for t in dense) for layout, rows in rivals.items()}
    layout = min(rivals, key=lambda name: (slowest[name] > 0, sum(rivals[name][t].median_us for t in dense)))
    ratios = ", ".join(f"{rivals[layout][t].median_us / dense[t].median_us:.2f}" for t in sorted(dense))
    reason = f"{measured}: {layout} takes {ratios} of the time of dense"
    return Fastest(layout if slowest[layout] <= 0 else "dense", reason)


def margin_us(median_us: float, mad_us: float) -> float:
    """max(2 %, 3 MAD): by how many microseconds a time has to differ from this one to count as another."""
    return max(TOLERANCE * median_us, 3 * mad_us)


def _excess(row: Row, dense: Row) -> float:
    """Microseconds by which a layout is slower than dense beyond the margin of noise; not positive where it is not."""
    return row.median_us - dense.median_us - margin_us(dense.median_us, dense.mad_us)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
