"""Runs on disk: JSON-lines files of measured rows, each with the record of where they were taken.

Every row of a file names that record, so rows of two GPUs, commits or drivers cannot end up in one comparison. What is
kept is named by it too: ``<gpu>/<day>-<commit>.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

__all__ = ["Run", "heading", "identity", "keep", "label", "place", "place_name", "read", "write"]

Row = dict[str, Any]
_ENVIRONMENT = "environment"
# All that may differ between the environment rows of a file, which are of one machine and one commit.
_OF_THE_MOMENT = "measured"
DRY_LABEL = "Dry run: toy sizes on a CPU, no figures"


@dataclass(frozen=True)
class Run:
    """A file of rows. ``record`` is that of its first environment row; ``rows`` are the others, in order, and of
    several for the same measurement only the last."""

    path: Path
    record: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def dry(self) -> bool:
        return any(row["dry"] for row in self.rows)

    @property
    def on_gpu(self) -> bool:
        """Whether its figures are those of a GPU."""
        return not self.dry and self.record.get("gpu") is not None

    @property
    def label(self) -> str:
        """What may stand above its figures."""
        return heading(self.record, self.rows)

    @property
    def day(self) -> str:
        return str(self.record.get("measured") or "")[:10] or "day not recorded"

    @property
    def commit(self) -> str:
        return str(self.record.get("commit") or "unknown")[:7]

    def of(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]


def label(record: Mapping[str, Any]) -> str:
    """A device as a reader would name it: ``NVIDIA H200``, or ``CPU: Intel Xeon ... (2 threads)``."""
    if record.get("gpu"):
        return str(record["gpu"])
    if not record.get("cpu"):
        return "device not recorded"
    threads = record.get("cpu_threads")
    return f"CPU: {record['cpu']}" + (f" ({threads} thread{'' if threads == 1 else 's'})" if threads else "")


def heading(record: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """``label``, but never a device's name above a dry run. ``ValueError`` where rows timed on a CPU come with the
    record of a GPU."""
    rows = list(rows)
    if any(row["dry"] for row in rows):
        return DRY_LABEL
    if record.get("gpu") and any(row.get("mode") == "cpu-wall" for row in rows):
        raise ValueError(f"rows timed on a CPU (mode cpu-wall) come with the record of a GPU, {record['gpu']}")
    return label(record)


def identity(record: Mapping[str, Any]) -> str:
    """The hash that names a record in the rows of its run."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def write(path: Path, record: Mapping[str, Any], rows: Iterable[Row], *, dry: bool = False) -> Run:
    """Writes a new file, its environment row first, then each row as it comes, so that what was measured stands even
    if the next one fails. Numbers that JSON lacks become null; ``dry``, ``environment`` and ``at_s`` are filled in.

    ``OSError`` where the file exists.
    """
    name, started, written = identity(record), time.monotonic(), []
    with path.open("x", encoding="utf-8") as out:
        for row in chain(({"kind": _ENVIRONMENT, "record": dict(record)},), rows):
            at_s = round(time.monotonic() - started, 3)
            written.append(_plain({**row, "dry": dry, "environment": name, "at_s": at_s}))
            out.write(json.dumps(written[-1], allow_nan=False) + "\n")
            out.flush()
    return _run(path, written)


def read(path: Path) -> Run:
    """A run as ``write``, the GPU check or ``keep`` left it; its environment row may stand anywhere.

    ``ValueError`` naming file and line for what is no JSON object, lacks ``kind``, ``dry`` or ``environment``, or
    belongs to another environment than the file's; naming the file where it has no environment row, or holds times of
    a CPU under the record of a GPU.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}, line {number}: is no JSON") from None
        if not isinstance(row, dict) or not {"kind", "dry", "environment"} <= row.keys():
            raise ValueError(f"{path}, line {number}: is no row, which has kind, dry and environment")
        if row["kind"] == _ENVIRONMENT and not isinstance(row.get("record"), dict):
            raise ValueError(f"{path}, line {number}: is an environment row without a record")
        found.append(row)
    records = [(number, row) for number, row in enumerate(found, 1) if row["kind"] == _ENVIRONMENT]
    if not records:
        raise ValueError(f"{path}: has no environment row, so nobody knows where it was measured")
    for number, row in records:
        if differs := _differences(records[0][1]["record"], row["record"]):
            raise ValueError(f"{path}, line {number}: is of another environment than the file's: {differs}")
    names = {row["environment"] for _, row in records}
    for number, row in enumerate(found, 1):
        if row["environment"] is not None and row["environment"] not in names:
            expected = " or ".join(sorted(map(str, names)))
            raise ValueError(f"{path}, line {number}: is of environment {row['environment']}, the file's is {expected}")
    try:
        heading(records[0][1]["record"], found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _run(path, found)


def place(run: Run, folder: Path) -> Path:
    """Where ``keep`` puts a run: ``<folder>/<gpu>/<day>-<commit>.jsonl``, a CPU's under ``cpu-<name>``."""
    return folder / place_name(run) / f"{run.day}-{run.commit}.jsonl"


def place_name(run: Run) -> str:
    """The device's name as folders and files have it."""
    return _slug(label(run.record)) if not run.dry else "dry-run"


def keep(path: Path, folder: Path, *, force: bool = False) -> Path:
    """Copies a finished run to its ``place`` under ``folder`` and returns that. A file that is there already gets the
    rows that it lacks, if they are of the same environment.

    ``ValueError`` for a dry run, a run without rows, one whose commit or day is not known, one of a checkout with
    changes (unless ``force``), and one of another environment than the file that is there, which says what differs.
    """
    run = read(path)
    if run.dry:
        raise ValueError(f"{path}: is a dry run, whose numbers mean nothing")
    if not run.rows:
        raise ValueError(f"{path}: holds no row but that of its environment")
    if re.fullmatch(r"[0-9a-f]{7}", run.commit) is None:
        raise ValueError(f"{path}: its commit is {run.record.get('commit')!r}, so nobody can measure it again")
    if re.fullmatch(r"\d{4}-\d\d-\d\d", run.day) is None:
        raise ValueError(f"{path}: the day of its measurement is {run.record.get('measured')!r}")
    if run.record.get("dirty") and not force:
        raise ValueError(
            f"{path}: was measured on a checkout with changes to {run.commit}; commit them and measure again"
        )
    target = place(run, folder)
    lines = path.read_text(encoding="utf-8").splitlines()
    if target.exists():
        if differs := _differences(read(target).record, run.record):
            raise ValueError(f"{target}: is there already and of another environment than {path}: {differs}")
        before = target.read_text(encoding="utf-8").splitlines()
        there = set(before)
        lines = [*before, *(line for line in lines if line not in there)]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as out:
        out.writelines(f"{line}\n" for line in lines)
    os.chmod(out.name, 0o644)  # a temporary file is its owner's alone
    os.replace(out.name, target)
    return target


def _run(path: Path, found: Iterable[Row]) -> Run:
    record: Mapping[str, Any] | None = None
    rows: dict[object, Row] = {}
    for number, row in enumerate(found):
        if row["kind"] == _ENVIRONMENT:
            record = record or row["record"]
            continue
        key = (row["kind"], row["key"]) if row.get("key") else number
        rows.pop(key, None)  # the later one also stands later
        rows[key] = row
    return Run(path, record or {}, tuple(rows.values()))


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """What two records of one machine and commit may not differ in, as text; empty where they agree."""
    names = sorted((first.keys() | second.keys()) - {_OF_THE_MOMENT})
    return ", ".join(
        f"{name} {second.get(name)!r} and not {first.get(name)!r}"
        for name in names
        if first.get(name) != second.get(name)
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
