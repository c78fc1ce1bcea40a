"""``sparsebert bench``: measures single layers or whole models on a device, and makes tables and plots of the runs."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebert.cli.common import Rendered, Report, table, the_device

if TYPE_CHECKING:
    import torch

SHAPES = ("base", "large", "minilm")
_OPS, _MODEL = "ops", "model"


def parse_counts(text: str) -> list[int]:
    """``1,128`` as positive numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{text!r} is not a list of positive numbers; write them as 1,128")
    return [int(part) for part in parts]


def parse_shapes(text: str) -> list[str]:
    """``base,large`` as names of models whose layers are measured."""
    names = [name.strip() for name in text.split(",")]
    if stray := [name for name in names if name not in SHAPES]:
        raise ValueError(f"{stray[0]!r} is not one of {', '.join(SHAPES)}")
    return names


def ops(
    *,
    shapes: Sequence[str],
    tokens: Sequence[int] | None,
    peers: Sequence[str] | None,
    device: str | None,
    out: Path | None,
    budget_s: float,
    report: Report,
) -> dict[str, Any]:
    """The ceilings of ``device``, then each layer of ``shapes`` by each peer that a glob of ``peers`` names, written to
    ``out`` as it goes, until ``budget_s`` seconds have passed."""
    where, file = the_device(device), _new(out, _OPS)
    from sparsebert.bench import jobs
    from sparsebert.bench.linear import ceilings, sweep

    # First without their ceilings: a name that is none should not cost their time.
    sweep.jobs(where, models=shapes, tokens=tokens, peers=peers)
    roofs = list(jobs.run(ceilings.jobs(where), report=report))
    listed = sweep.jobs(where, models=shapes, tokens=tokens, peers=peers, ceilings=ceilings.of(roofs))
    rows = chain(roofs, jobs.run(listed, budget_s=budget_s, report=report))
    return _measured(where, file, _OPS, rows)


def model(
    *,
    models: Sequence[str],
    batches: Sequence[int],
    lengths: Sequence[int],
    rungs: Sequence[str] | None,
    compiled: bool,
    device: str | None,
    out: Path | None,
    budget_s: float,
    report: Report,
) -> dict[str, Any]:
    """Whole models rung by rung, written to ``out`` as it goes, until ``budget_s`` seconds have passed."""
    where, file = the_device(device), _new(out, _MODEL)
    from sparsebert.bench import jobs
    from sparsebert.bench.models import ladder

    listed = ladder.jobs(
        where,
        models=models,
        batches=batches,
        lengths=lengths,
        rungs=rungs,
        compiled=compiled,
    )
    if not listed:
        raise ValueError(f"there is nothing to measure: no rung is left of {', '.join(rungs or [])}")
    return _measured(where, file, _MODEL, jobs.run(listed, budget_s=budget_s, report=report))


def report(paths: Sequence[Path], out: Path, *, plots: bool, progress: Report) -> dict[str, Any]:
    """``report.md`` in ``out``, and with ``plots`` the plots that it shows, from the runs in the files ``paths``."""
    from sparsebert.bench import records
    from sparsebert.bench.models.published import LINES
    from sparsebert.bench.report import page
    from sparsebert.bench.report import plots as drawing

    devices = page.devices([records.read(path) for path in paths])
    out.mkdir(parents=True, exist_ok=True)
    files = []
    drawn = [plot for device in devices for plot in page.plots_of(device, LINES)] if plots else []
    for done, plot in enumerate(drawn):
        progress(done, len(drawn), plot.name)
        files += drawing.save(plot, out)
    # Last, so that what it shows is there.
    sections = [page.markdown(device, published=LINES, images="" if plots else None) for device in devices]
    (out / "report.md").write_text("\n".join(["# Measurements\n", *sections]), encoding="utf-8")
    return {"devices": [device.label for device in devices], "files": [out / "report.md", *files]}


def render(result: dict[str, Any]) -> Rendered:
    """The short tables of ``ops`` or ``model``."""
    from sparsebert.bench.models.published import LINES
    from sparsebert.bench.report import page, tables

    rows: list[dict[str, Any]] = result["rows"]
    if not result["on_gpu"]:
        yield page.CPU_NOTE
    if result["kind"] == _OPS:
        first = (f"Linear layers on {result['device']}, the fastest format of each", tables.fastest(rows))
    else:
        first = (f"Models end to end on {result['device']}", tables.ladder(rows, LINES))
    for title, shown in (first, ("Without a number", tables.troubles(rows))):
        if shown.lines:
            yield title
            yield table(shown.titles, shown.lines)
    yield f"{len(rows)} rows written to {result['file']}; `sparsebert bench report` makes tables and plots of them"


def render_report(result: dict[str, Any]) -> Rendered:
    yield f"measured on {'; '.join(result['devices'])}"
    for file in result["files"]:
        yield f"written: {file}"


def _new(out: Path | None, kind: str) -> Path:
    """The file of a run, which may not be there yet."""
    file = out or Path(f"bench-{kind}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}.jsonl")
    if file.exists():
        raise ValueError(f"{file}: is there already, and a run is a file of its own")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{file}: there is no folder {file.parent}")
    return file


def _measured(where: torch.device, file: Path, kind: str, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    from sparsebert.bench import records
    from sparsebert.bench.environment import environment

    try:
        run = records.write(file, environment(where), rows)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was measured is in {file}") from None
    return {"kind": kind, "device": run.label, "on_gpu": run.on_gpu, "file": file, "rows": list(run.rows)}
