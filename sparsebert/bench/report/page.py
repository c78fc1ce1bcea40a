"""A device's figures under its name: tables and plots of the newest runs, each with the day and commit it is of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsebert.bench.models.published import PublishedLine
from sparsebert.bench.records import Run, place_name
from sparsebert.bench.report import compare, plots, tables

Row = dict[str, Any]

CPU_NOTE = "These are this CPU's figures and say nothing about a GPU."
DRY_NOTE = "**Dry run** at toy sizes on a CPU: the numbers below mean nothing."
_VERSIONS = ("torch", "triton", "transformers", "cuda", "driver")

OPS_NOTE = (
    "One layer by itself. Best dense path: the fastest dense kernel at the same size, dtype, activation and token "
    "count, with its time. The other columns are times as fast as that, by the fastest backend; a word stands where "
    "there is no number."
)
BREAK_EVEN_NOTE = (
    "Token counts at which a format is faster than the best dense path, by more than max(2 %, 3 MAD) of its time; `up` "
    "is to the largest count measured."
)
ROOFLINE_NOTE = (
    "The least time that the measured ceilings allow, for the bytes that must move and the operations that the format "
    "needs, over the time taken; all layers and token counts."
)
LADDER_NOTE = (
    "Whole models. Memory is the peak of a call, model its weights. The last column is the time of the best dense rung "
    "over that of the rung; published figures are of other machines and have none."
)


@dataclass(frozen=True)
class Device:
    """The runs of one device, oldest first."""

    label: str
    slug: str
    runs: tuple[Run, ...]

    @property
    def on_gpu(self) -> bool:
        return self.runs[0].on_gpu

    def newest(self, kind: str) -> Run | None:
        """The newest run with rows of this kind: figures of two runs are never in one table."""
        return next((run for run in reversed(self.runs) if run.of(kind)), None)

    def rows(self) -> list[Row]:
        """What ``plots`` draws: the newest sweep with its own ceilings, and the newest ladder."""
        sweep, ladder = self.newest("linear"), self.newest("model")
        rows = [row for kind in ("linear", "ceiling") for row in (sweep.of(kind) if sweep else [])]
        return [*rows, *(ladder.of("model") if ladder else [])]


def devices(runs: Iterable[Run]) -> list[Device]:
    """The runs by what may stand above them, GPUs first."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: str(run.record.get("measured"))):
        found.setdefault(run.label, []).append(run)
    every = [Device(label, place_name(of[0]), tuple(of)) for label, of in found.items()]
    return sorted(every, key=lambda device: (not device.on_gpu, device.label))


def plots_of(device: Device, published: Iterable[PublishedLine] = ()) -> list[plots.Plot]:
    return plots.of(device.slug, device.label, device.rows(), published)


def markdown(
    device: Device,
    *,
    published: Sequence[PublishedLine] = (),
    level: int = 2,
    images: str | None = None,
    full: bool = True,
) -> str:
    """The device's name as a heading of ``level``, then a section for each thing measured. ``images`` is where the
    files of ``plots_of`` lie, seen from the page; None leaves them out. Without ``full`` neither the times of all
    layers nor the rooflines are listed, and break-even points are those of the plainest layers."""
    parts = ["#" * level + f" {device.label}"]
    if not device.on_gpu:
        parts.append(DRY_NOTE if device.runs[0].dry else CPU_NOTE)
    drawn = plots_of(device, published) if images is not None else []
    shown: list[tuple[str, str, str, str, str]] = []
    if sweep := device.newest("linear"):
        rows = sweep.rows
        even = tables.break_even(rows, plainest=not full).markdown()
        plainest = compare.variants(compare.points(rows))[:1]
        which = "".join(f" Activation {activation}, {dtype}." for activation, dtype in plainest if not full)
        shown.append(("linear", "Break-even", BREAK_EVEN_NOTE + which, even, "break-even"))
        layers = tables.ops(rows).markdown() if full else ""
        shown.append(("linear", "Linear layers", OPS_NOTE, layers, "speed-up"))
        roofs = "\n\n".join(table.markdown() for table in (tables.ceilings(rows), tables.roofline(rows)) if full)
        shown.append(("linear", "Roofline", ROOFLINE_NOTE, roofs.strip(), "roofline"))
    if checked := device.newest("never_slower"):
        shown.append(("never_slower", "Never slower", "", tables.never_slower(checked.rows), ""))
    if ladder := device.newest("model"):
        table = tables.ladder(ladder.rows, published).markdown()
        shown.append(("model", "Models end to end", LADDER_NOTE, table, "ladder"))
    for kind, title, note, body, name in shown:
        those = [plot for plot in drawn if f"{plot.name}-".startswith(f"{device.slug}-{name}-") and name]
        image = "\n\n".join(f"![{plot.title}]({images}{plot.name}.svg)" for plot in (those if full else those[:1]))
        if body or image:
            run = device.newest(kind)
            head = "#" * (level + 1) + f" {title}"
            parts += [head, " ".join(filter(None, (note, _origin(run) if run else ""))), body, image]
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(run: Run) -> str:
    """``Measured 2020-01-02 at commit 0123456 (torch 2.0, driver 1.2).``"""
    versions = ", ".join(f"{name} {run.record[name]}" for name in _VERSIONS if run.record.get(name))
    changed = ", with changes" if run.record.get("dirty") else ""
    return f"Measured {run.day} at commit {run.commit}{changed}{f' ({versions})' if versions else ''}."
