"""The study's rows as tables. Metrics and their differences are in points, a hundredth; ``-`` stands where nobody
measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sparsebert.bench.report.tables import NOTHING, Table, ratio
from study.arms import ARMS, BUDGETS, FINE_TUNED, ONE_LAYER
from study.claims import RANKS, Verdict, best_dense, interval
from study.rows import Row, Study, at, dev
from study.statistics import Difference, mean, paired, sd

METRICS = {"matthews": "Matthews correlation", "accuracy": "accuracy", "f1": "F1", "pearson": "Pearson correlation"}
_EMPTY = {"empty_rows": "empty rows", "empty_columns": "empty columns"}
_HELD_AGAINST = ("baseline", "over baseline", "over dense", "encoder on disk")
# The sparsities that README shows.
_BRIEF = (0, 50, 75, 95)
_START_ABOUT = "the dense model that fine-tuned arms start from"


class Shape(NamedTuple):
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}"


@dataclass(frozen=True)
class Entry:
    """An arm at one sparsity on one task: the rows that count, by seed, and what they are held against. ``size``: bytes
    of the encoder's linears on disk over those of the dense ones; ``latency``: time over dense by shape; ``rates``: how
    much of the grid was run, where that is not all."""

    arm: str
    sparsity: int
    rows: Mapping[int, Row]
    baseline: str | None
    over_baseline: Difference | None
    over_dense: Difference | None
    size: float | None
    latency: Mapping[Shape, float]
    rates: str

    @property
    def metrics(self) -> dict[int, float]:
        return {seed: dev(row) for seed, row in self.rows.items()}

    @property
    def mean(self) -> float:
        return mean(self.metrics.values())

    @property
    def sd(self) -> float | None:
        return sd(self.metrics.values())

    @property
    def format(self) -> str:
        return newest(self.rows).get("format") or NOTHING

    @property
    def collapsed(self) -> str:
        """``(one class)`` where every run predicts one class for all rows, or of how many runs that is so."""
        count = sum(row["one_class"] for row in self.rows.values())
        if not count:
            return ""
        return " (one class)" if count == len(self.rows) else f" (one class: {count} of {len(self.rows)})"

    @property
    def ablation(self) -> bool:
        return is_ablation(self.arm)


def newest(rows: Mapping[int, Row]) -> Row:
    return rows[max(rows)]


def is_ablation(arm: str) -> bool:
    """Whether it has its learning rate from the arm that it is a change of."""
    return arm in ARMS and ARMS[arm].tuned_as is not None and ARMS[arm].start != ONE_LAYER


def entries(study: Study, task: str) -> list[Entry]:
    """By sparsity, the best mean first."""
    dense, full = best_dense(study, task), _dense_bytes(study, task)
    found = []
    for arm, sparsity in study.arms(task):
        rows = study.of(task, arm, sparsity)
        if not rows:
            continue
        baseline = ARMS[arm].baseline if arm in ARMS else None
        held = {other: study.of(task, other, 0 if other == dense else sparsity) for other in (baseline, dense) if other}
        against = {name: paired(_metrics(rows), _metrics(of)) for name, of in held.items()}
        sizes = [size for row in rows.values() if (size := at(row, "bytes.encoder.disk_bytes")) is not None]
        planned, grid = BUDGETS[study.budget].rates, study.grid(task, arm, sparsity)
        done = sum(rate in grid for rate in planned)
        found.append(
            Entry(
                arm,
                sparsity,
                rows,
                baseline,
                against.get(baseline or ""),
                None if arm == dense else against.get(dense or ""),
                mean(sizes) / full if sizes and full else None,
                _latency(study, newest(rows), sparsity),
                f" ({done} of {len(planned)} rates)" if grid and done < len(planned) else "",
            )
        )
    return sorted(found, key=lambda entry: (entry.sparsity, -entry.mean))


def shapes(study: Study) -> list[Shape]:
    return sorted({Shape(row["batch"], row["length"]) for row in study.latency})


def times(study: Study, format: str | None) -> dict[Shape, float]:
    """Time over dense by shape, of what was timed in that format."""
    rows = [row for row in study.latency if row["format"] == format]
    return {Shape(row["batch"], row["length"]): row["ratio"] for row in rows}


def metric_name(found: Iterable[Entry]) -> str:
    names = {row["metric"] for entry in found for row in entry.rows.values()}
    return " or ".join(METRICS.get(name, name) for name in sorted(names))


def main(study: Study, task: str) -> Table:
    """Every arm of a task."""
    found, lines = entries(study, task), []
    for entry in found:
        name = (entry.arm + entry.rates, _teacher(entry.arm), entry.format, f"{entry.sparsity} %")
        metric = (points(entry.mean) + entry.collapsed, points(entry.sd), str(len(entry.rows)))
        lines.append((*name, *metric, *_held_against(entry), *_times(study, entry.latency)))
    titles = ("arm", "teacher", "format", "sparsity", metric_name(found), "sd", "seeds", *_HELD_AGAINST)
    return Table((*titles, *_timed(study)), lines)


def brief(study: Study, task: str) -> Table:
    """A task's arms without ablations, at the sparsities that README shows."""
    found = [entry for entry in entries(study, task) if entry.sparsity in _BRIEF and not entry.ablation]
    lines = []
    for entry in found:
        spread = "" if entry.sd is None else f" ± {points(entry.sd)}"
        metric = f"{points(entry.mean)}{spread} ({len(entry.rows)}){entry.collapsed}"
        lines.append((entry.arm + entry.rates, f"{entry.sparsity} %", metric, *_held_against(entry)))
    return Table(("arm", "sparsity", f"{metric_name(found)} ± sd (seeds)", *_HELD_AGAINST), lines)


def rates(study: Study, task: str) -> Table:
    """The metric on held-out rows by learning rate on the first seed, the chosen one bold."""
    grids = {place: grid for place in study.arms(task) if (grid := study.grid(task, *place))}
    every = sorted(
        {rate for grid in grids.values() for rate in grid} | (set(BUDGETS[study.budget].rates) if grids else set())
    )
    lines = []
    for (arm, sparsity), grid in grids.items():
        chosen = study.selected_rate(task, arm, sparsity)
        cells = [points(grid[rate].get("holdout")) if rate in grid else NOTHING for rate in every]
        marked = (f"**{cell}**" if rate == chosen else cell for rate, cell in zip(every, cells, strict=True))
        lines.append((arm, f"{sparsity} %", *marked))
    return Table(("arm", "sparsity", *(f"{rate:g}" for rate in every)), lines)


def spectra(study: Study, task: str) -> Table:
    """Ranks in per cent of the full rank, means over layers and seeds, as trained and with the mask shuffled."""
    lines = []
    for entry in _probed(study, task):
        for kind, label in (("spectra", "as trained"), ("shuffled", "mask shuffled")):
            if not (of := [found for row in entry.rows.values() if (found := at(row, f"probes.{kind}"))]):
                continue
            held = ([row[name] for row in of if row.get(name) is not None] for name in (*RANKS, *_EMPTY))
            cells = (share(mean(numbers)) if numbers else NOTHING for numbers in held)
            lines.append((entry.arm, f"{entry.sparsity} %", label, str(len(of)), *cells))
    return Table(("arm", "sparsity", "weights", "seeds", *RANKS.values(), *_EMPTY.values()), lines)


def truncated(study: Study, task: str) -> Table:
    """The metric after truncation to a low rank, without training."""
    found = [entry for entry in _probed(study, task) if any(at(row, "probes.truncated") for row in entry.rows.values())]
    every = sorted(
        {name for entry in found for row in entry.rows.values() for name in at(row, "probes.truncated") or ()},
        key=float,
        reverse=True,
    )
    lines = []
    for entry in found:
        held = [at(row, "probes.truncated") or {} for row in entry.rows.values()]
        cells = []
        for name in every:
            numbers = [one[name] for one in held if one.get(name) is not None]
            cells.append(points(mean(numbers)) if numbers else NOTHING)
        lines.append((entry.arm, f"{entry.sparsity} %", points(entry.mean) + entry.collapsed, *cells))
    return Table(("arm", "sparsity", "as trained", *(f"low-rank:{name}" for name in every)), lines)


def int8(study: Study, task: str) -> Table:
    """int8 on top of each arm that has it, beside the same weights in floats; the best of each sparsity by held-out
    rows is marked."""
    found = [entry for entry in entries(study, task) if any(row.get("int8") for row in entry.rows.values())]
    full = _dense_bytes(study, task)
    lines = []
    for entry in found:
        arms = [other.arm for other in found if other.sparsity == entry.sparsity]
        best = " (best by held-out rows)" if study.best(task, arms, entry.sparsity) == entry.arm else ""
        both = {seed: row for seed, row in entry.rows.items() if at(row, "int8.dev") is not None}
        quantized = {seed: row["int8"]["dev"][row["metric"]] for seed, row in both.items()}
        floats = _metrics(both)
        sizes = [size for row in both.values() if (size := at(row, "int8.bytes.encoder.disk_bytes")) is not None]
        size = share(mean(sizes) / full if sizes and full else None)
        cells = (str(len(both)), *(points(mean(one.values())) if one else NOTHING for one in (floats, quantized)))
        over = difference_text(paired(quantized, floats), len(both))
        timed = times(study, "int8" if entry.sparsity == 0 else f"int8+{entry.format}")
        lines.append((entry.arm + best, entry.format, *cells, over, share(entry.size), size, *_times(study, timed)))
    titles = ("arm", "format", "seeds", "float", "int8", "int8 - float", "float on disk", "int8 on disk")
    return Table((*titles, *_timed(study)), lines)


def verdicts(found: Iterable[Verdict]) -> Table:
    lines = [(one.id, one.statement, f"**{one.outcome}**", one.figures, f"`{one.command}`") for one in found]
    return Table(("", "statement", "outcome", "figures", "measured again by"), lines)


def arms(studies: Iterable[Study]) -> Table:
    """What the arms are that have rows."""
    there = {row["arm"] for study in studies for row in study.accuracy}
    lines = [(FINE_TUNED, _START_ABOUT, NOTHING, NOTHING)] if FINE_TUNED in there else []
    for arm in ARMS.values():
        if arm.name in there:
            about = arm.about.replace("|", "&#124;")
            lines.append((arm.name, about, arm.start, arm.tuned_as or ("its own" if arm.trained else NOTHING)))
    return Table(("arm", "what it is", "starts from", "learning rate of"), lines)


def points(value: float | None) -> str:
    return NOTHING if value is None else f"{round(100 * value, 1) + 0.0:.1f}"


def share(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"


def difference_text(found: Difference | None, seeds: int) -> str:
    """The mean with its interval, and of how many pairs it is where that is not all seeds."""
    if found is None:
        return NOTHING
    pairs = "" if found.n == seeds else f" ({found.n} pair{'' if found.n == 1 else 's'})"
    return interval(found) + pairs


def _timed(study: Study) -> list[str]:
    return [f"time at {shape}" for shape in shapes(study)]


def _times(study: Study, found: Mapping[Shape, float]) -> list[str]:
    return [ratio(found[shape]) if shape in found else NOTHING for shape in shapes(study)]


def _held_against(entry: Entry) -> tuple[str, ...]:
    over = (difference_text(found, len(entry.rows)) for found in (entry.over_baseline, entry.over_dense))
    return (entry.baseline or NOTHING, *over, share(entry.size))


def _teacher(arm: str) -> str:
    """Who brought it, if there is one."""
    if arm not in ARMS or not ARMS[arm].taught:
        return NOTHING
    return "added by us" if ARMS[arm].distilled else "the paper's"


def _metrics(rows: Mapping[int, Row]) -> dict[int, float]:
    return {seed: dev(row) for seed, row in rows.items()}


def _probed(study: Study, task: str) -> list[Entry]:
    return [entry for entry in entries(study, task) if any(row.get("probes") for row in entry.rows.values())]


def _dense_bytes(study: Study, task: str) -> int | None:
    """Of the encoder that is compressed."""
    sizes = (at(row, "bytes.encoder.dense_bytes") for row in study.accuracy if row["task"] == task)
    return max((size for size in sizes if size is not None), default=None)


def _latency(study: Study, row: Row, sparsity: int) -> dict[Shape, float]:
    """Time over dense; that of the dense model is 1, and a smaller dense model was not timed."""
    if sparsity == 0:
        return dict.fromkeys(shapes(study), 1.0)
    return {} if row.get("format") == "dense" else times(study, row.get("format"))
