"""The study's rows, as benchmarks/accuracy.py wrote them, and which of them count.

For each task, arm, sparsity and seed one row counts: that of the chosen learning rate. An arm without ``tuned_as`` has
a row for every rate on the first seed, of which the one with the best metric on held-out rows chooses (of equals the
smaller rate); on other seeds it has that rate. What has no rate of its own to choose, an ablation or pruning alone,
counts as it was run last.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from study.arms import ARMS, BUDGETS, FINE_TUNED

Row = dict[str, Any]

_TEXT, _WHOLE, _NUMBER = (str,), (int,), (int, float)
_ENVIRONMENT, _ACCURACY, _LATENCY = "environment", "accuracy", "latency"
# What a row of each kind has to have; a dot leads into an object.
_REQUIRED: dict[str, dict[str, tuple[type, ...]]] = {
    _ENVIRONMENT: {"record": (dict,)},
    _ACCURACY: {
        **dict.fromkeys(("key", "budget", "task", "arm", "metric"), _TEXT),
        **dict.fromkeys(("sparsity", "seed"), _WHOLE),
        "dev": (dict,),
        "one_class": (bool,),
    },
    _LATENCY: {"format": _TEXT, "batch": _WHOLE, "length": _WHOLE, "ratio": _NUMBER},
}
# What may be missing or null.
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "format": _TEXT,
    "trace": (list,),
    "reload_agrees": (bool,),
    **dict.fromkeys(("bytes.encoder.dense_bytes", "bytes.encoder.disk_bytes", "int8.bytes.encoder.disk_bytes"), _WHOLE),
    **dict.fromkeys(("int8.dev", "probes.spectra", "probes.shuffled", "probes.truncated"), (dict,)),
    **dict.fromkeys(("lr", "holdout", "budget_steps", "at_start", "before_projection"), _NUMBER),
}


@dataclass(frozen=True)
class Study:
    """All rows of a budget, oldest first; ``environments`` are the records by the hash that rows have."""

    budget: str
    environments: Mapping[str, Mapping[str, Any]]
    accuracy: tuple[Row, ...]
    latency: tuple[Row, ...]

    @cached_property
    def tasks(self) -> list[str]:
        return sorted({row["task"] for row in self.accuracy})

    @cached_property
    def first_seed(self) -> int | None:
        """The one that rates are chosen on: the smallest of all rows."""
        return min((row["seed"] for row in self.accuracy), default=None)

    @cached_property
    def _places(self) -> Mapping[tuple[str, str, int], list[Row]]:
        found: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
        for row in self.accuracy:
            found[row["task"], row["arm"], row["sparsity"]].append(row)
        return dict(found)

    @cached_property
    def _arms(self) -> Mapping[str, list[tuple[str, int]]]:
        order = {arm: i for i, arm in enumerate((FINE_TUNED, *ARMS))}
        found: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for task, arm, sparsity in sorted(self._places, key=lambda place: (order[place[1]], place[2])):
            found[task].append((arm, sparsity))
        return dict(found)

    def arms(self, task: str) -> list[tuple[str, int]]:
        """The arms with rows on the task, in the order of ``ARMS``, each with its sparsities."""
        return self._arms.get(task, [])

    def sparsities(self, task: str, arm: str) -> list[int]:
        return [sparsity for name, sparsity in self.arms(task) if name == arm]

    def grid(self, task: str, arm: str, sparsity: int) -> dict[float, Row]:
        """The rows that the rate is chosen among, by rate; empty where there is no choice."""
        rows = [] if has_one_rate(arm) else self._places.get((task, arm, sparsity), [])
        found = {row["lr"]: row for row in rows if row["seed"] == self.first_seed and row.get("lr") is not None}
        return dict(sorted(found.items()))

    def selected_rate(self, task: str, arm: str, sparsity: int) -> float | None:
        """None where the first seed has no row yet, or the arm has no rate."""
        if has_one_rate(arm):
            rows = self._places.get((task, arm, sparsity), [])
            return rows[-1].get("lr") if rows else None
        grid = self.grid(task, arm, sparsity)
        return max(grid, key=lambda rate: (_holdout(grid[rate]), -rate), default=None)

    def of(self, task: str, arm: str, sparsity: int) -> dict[int, Row]:
        """The rows that count, by seed."""
        rows = self._places.get((task, arm, sparsity), [])
        rate = self.selected_rate(task, arm, sparsity)
        found = {row["seed"]: row for row in rows if has_one_rate(arm) or (rate is not None and row.get("lr") == rate)}
        return dict(sorted(found.items()))

    def best(self, task: str, arms: Iterable[str], sparsity: int) -> str | None:
        """The arm that is best on held-out rows, on average over its seeds; of equals the first."""
        means = {}
        for arm in arms:
            if rows := self.of(task, arm, sparsity).values():
                means[arm] = sum(map(_holdout, rows)) / len(rows)
        return max(means, key=means.__getitem__, default=None)


def has_one_rate(arm: str) -> bool:
    """Whether there is nothing to choose: the rate is another arm's, or nothing is trained."""
    return arm in ARMS and (ARMS[arm].tuned_as is not None or not ARMS[arm].trained)


def at(row: Mapping[str, Any], path: str) -> Any:
    """``at(row, "bytes.encoder.disk_bytes")``; None where it, or what it would be in, is missing or null."""
    value: Any = row
    for name in path.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} leads into a {type(value).__name__}, expected an object")
        value = value.get(name)
    return value


def dev(row: Mapping[str, Any]) -> float:
    """Its metric on the dev set."""
    return row["dev"][row["metric"]]


def studies(folder: Path) -> list[Study]:
    """What lies in ``folder``, a ``<budget>.jsonl`` each, in the order of ``BUDGETS``; files without a row of an arm
    are left out."""
    order = list(BUDGETS)
    files = {file.stem: file for file in folder.glob("*.jsonl")}
    if strange := sorted(files.keys() - set(order)):
        raise ValueError(f"{files[strange[0]]}: is of no budget, expected {' or '.join(f'{n}.jsonl' for n in order)}")
    found = [read(files[name]) for name in order if name in files]
    return [study for study in found if study.accuracy]


def read(path: Path) -> Study:
    """The rows of one file; of several with the same key the last counts.

    ``ValueError`` naming file and line for what is no such row, is of another budget than the file's name, of an arm
    that there is not, or of an environment that no line of the file describes.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(_row(line, path.stem))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    records = {row["environment"]: row["record"] for row in rows if row["kind"] == _ENVIRONMENT}
    kept: dict[str, dict[Any, Row]] = {_ACCURACY: {}, _LATENCY: {}}
    for number, row in enumerate(rows, 1):
        if row["environment"] not in records:
            expected = ", ".join(sorted(records)) or "a line of kind environment"
            raise ValueError(f"{path}, line {number}: is of environment {row['environment']}, expected {expected}")
        if row["kind"] != _ENVIRONMENT:
            key = row["key"] if row["kind"] == _ACCURACY else (row["format"], row["batch"], row["length"])
            kept[row["kind"]].pop(key, None)  # the later one also stands later
            kept[row["kind"]][key] = row
    return Study(path.stem, records, *(tuple(kept[kind].values()) for kind in (_ACCURACY, _LATENCY)))


def _row(line: str, budget: str) -> Row:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except ValueError:
        raise ValueError("is no JSON") from None
    if not isinstance(row, dict) or row.get("kind") not in _REQUIRED or not isinstance(row.get("environment"), str):
        raise ValueError(f"is no row, which has an environment and a kind: {', '.join(_REQUIRED)}")
    for name, kinds in _REQUIRED[row["kind"]].items():
        _check(name, at(row, name), kinds)
    if row["kind"] != _ACCURACY:
        return row
    for name, kinds in _OPTIONAL.items():
        if (value := at(row, name)) is not None:
            _check(name, value, kinds)
    if row["budget"] != budget:
        raise ValueError(f"budget is {row['budget']!r}, expected {budget!r} as the file is named")
    if row["arm"] not in (FINE_TUNED, *ARMS):
        raise ValueError(f"arm is {row['arm']!r}, expected {FINE_TUNED} or one of {', '.join(ARMS)}")
    for name in ("dev", "int8.dev"):
        if at(row, name) is not None:
            _check(f"{name}.{row['metric']}", at(row, name).get(row["metric"]), _NUMBER)
    for entry in row.get("trace") or ():
        _check("an entry of trace", entry, (dict,))
    return row


def _check(name: str, value: object, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(kind.__name__ for kind in kinds)}")


def _holdout(row: Row) -> float:
    value = row.get("holdout")
    return float("-inf") if value is None else value


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)
