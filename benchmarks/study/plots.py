"""The study's rows as plots: what a point of the metric costs in bytes and in time, what pruning leaves of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from sparsebert.bench.report.plots import Plot
from sparsebert.configs import parse_config
from study import tables
from study.arms import ARMS, DISTILLED
from study.claims import RANKS_AT
from study.rows import Study, at
from study.statistics import mean, sd
from study.tables import Entry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Format -> what to call the arms that end in it, with a colour and a marker; told apart by every kind of sight.
_FAMILIES = {
    "dense": ("dense", "#555555", "s"),
    "nm": ("groups of four", "#0072b2", "o"),
    "bitmap": ("anywhere", "#e69f00", "^"),
    "low_rank": ("low rank", "#009e73", "D"),
    "low_rank_sparse": ("low rank and rows", "#d55e00", "v"),
}
_RANKS = {
    "gradual magnitude": ("gradual-ranks", "spectra", "#e69f00", "-"),
    "movement": ("movement-ranks", "spectra", "#0072b2", "-"),
    "movement, mask shuffled": ("movement-ranks", "shuffled", "#0072b2", "--"),
}


@dataclass(frozen=True)
class Point:
    entry: Entry
    x: float

    @property
    def family(self) -> str:
        return family(self.entry.format)


def of(study: Study) -> list[Plot]:
    """The plots that the study has numbers for. Needs no matplotlib."""
    found: list[tuple[str, str, Callable[[str], Figure]]] = []
    shown = {task: [entry for entry in tables.entries(study, task) if not entry.ablation] for task in study.tasks}
    sizes = {task: [Point(e, 100 * e.size) for e in entries if e.size] for task, entries in shown.items()}
    if any(sizes.values()):
        text = "the metric against the encoder on disk"
        found.append(("size", text, partial(trade, sizes, "encoder's linears on disk, % of dense")))
    times = {
        f"{task}, {shape}": [Point(entry, entry.latency[shape]) for entry in entries if shape in entry.latency]
        for task, entries in shown.items()
        for shape in tables.shapes(study)
    }
    times = {title: points for title, points in times.items() if any(point.entry.sparsity for point in points)}
    if times:
        text = "the metric against the time of a batch"
        found.append(("latency", text, partial(trade, times, "time over dense, above 1 is slower")))
    if ranked := [task for task in study.tasks if any(_ranks(study, task, *row[:2]) for row in _RANKS.values())]:
        found.append(("ranks", "ranks that pruning leaves", partial(ranks, study, ranked)))
    label = f"budget {study.budget}"
    return [
        Plot(f"{study.budget}-{name}", f"{label}: {text}", partial(draw, f"{label}: {text}"))
        for name, text, draw in found
    ]


def family(format: str) -> str:
    """The key of ``_FAMILIES`` for a format as rows have it; without one it is dense."""
    try:
        found = parse_config(format).format
    except ValueError:
        return "dense"
    return found if found in _FAMILIES else "dense"


def front(points: Sequence[Point]) -> list[Point]:
    """Those than which no other is both smaller and better, from the smallest on."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.entry.mean)):
        if not found or point.entry.mean > found[-1].entry.mean:
            found.append(point)
    return found


def trade(panels: dict[str, list[Point]], label: str, title: str) -> Figure:
    """A panel a task: means with their standard deviations over x, and the front that nothing beats. Hollow: with a
    teacher that the paper has not."""
    panels = {name: points for name, points in panels.items() if points}
    figure, axes = _panels(len(panels), title)
    for axis, (name, points) in zip(axes, panels.items(), strict=True):
        best = front(points)
        xs, ys = [point.x for point in best], [100 * point.entry.mean for point in best]
        axis.step(xs, ys, where="post", color="#999999", linewidth=0.8, zorder=1)
        for point in points:
            _, colour, marker = _FAMILIES[point.family]
            hollow = point.entry.arm in ARMS and ARMS[point.entry.arm].distilled
            axis.errorbar(
                point.x,
                100 * point.entry.mean,
                yerr=100 * (point.entry.sd or 0.0),
                color=colour,
                marker=marker,
                markerfacecolor="white" if hollow else colour,
                markersize=4.5,
                linewidth=0.6,
                alpha=0.85,
            )
        for point in best:
            offset = {"xytext": (-3, 3), "textcoords": "offset points", "fontsize": 6}
            axis.annotate(point.entry.arm, (point.x, 100 * point.entry.mean), ha="right", **offset)
        axis.margins(x=0.22)  # for the names
        axis.set_title(name)
        axis.set_xlabel(label)
        axis.set_ylabel(tables.metric_name(point.entry for point in points))
        axis.grid(alpha=0.3, linewidth=0.4)
    _legend(figure, {point.family for points in panels.values() for point in points})
    return figure


def ranks(study: Study, tasks: Sequence[str], title: str) -> Figure:
    """A row a task, a panel a way to measure a rank: per cent of the full one over the sparsity."""
    figure, axes = _panels(len(tasks) * len(tables.RANKS), title, columns=len(tables.RANKS), width=3.2)
    for axis, (task, (kind, name)) in zip(axes, product(tasks, tables.RANKS.items()), strict=True):
        for label, (arm, probe, colour, line) in _RANKS.items():
            found = _ranks(study, task, arm, probe, kind)
            xs, ys = list(found), [100 * mean(held) for held in found.values()]
            spread = [100 * (sd(held) or 0.0) for held in found.values()]
            axis.errorbar(xs, ys, yerr=spread, label=label, color=colour, linestyle=line, marker="o", markersize=3)
        axis.set_title(f"{task}: {name}", fontsize=9)
        axis.set_xlabel("sparsity, %")
        axis.set_ylabel("% of the full rank")
        axis.set_xticks(RANKS_AT)
        axis.grid(alpha=0.3, linewidth=0.4)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_RANKS))
    return figure


def _ranks(study: Study, task: str, arm: str, probe: str, kind: str = "effective_rank") -> dict[int, list[float]]:
    """A rank of each seed, by sparsity."""
    found = {}
    for sparsity in study.sparsities(task, arm):
        rows = study.of(task, arm, sparsity).values()
        held = [number for row in rows if (number := at(row, f"probes.{probe}.{kind}")) is not None]
        if held:
            found[sparsity] = held
    return found


def _legend(figure: Figure, families: set[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
        for name, (label, colour, marker) in _FAMILIES.items()
        if name in families
    ]
    hollow = Line2D(
        [], [], color="black", marker="o", markerfacecolor="white", linestyle="", label=f"{DISTILLED} (hollow)"
    )
    # Two lines: one is wider than a single panel.
    figure.legend(handles=[*handles, hollow], loc="outside lower center", ncols=(len(handles) + 2) // 2)


def _panels(count: int, title: str, *, columns: int = 2, width: float = 5.0) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` panels, each ``width`` inches wide, a few in a row."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(max(columns * width, 6.5), lines * 3.4 + 1), layout="constrained")
    figure.suptitle(title)
    every = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for axes in every[count:]:
        axes.remove()
    return figure, every[:count]
