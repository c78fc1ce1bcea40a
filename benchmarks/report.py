"""What the repository says of its speed, made from the runs in benchmarks/data:

    python benchmarks/report.py                     README's performance section, docs/performance, shipped.json
    python benchmarks/report.py --check             exit status 1 where one of these is not what the data give
    python benchmarks/report.py --keep rows.jsonl   first puts a finished run to the data

Only files named <day>-<commit>.jsonl are runs; only those of GPUs are shown.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from sparsebert.bench import records  # noqa: E402
from sparsebert.bench.models.published import LINES  # noqa: E402
from sparsebert.bench.report import choices, page, plots  # noqa: E402
from sparsebert.ops import measurements  # noqa: E402

DATA = "benchmarks/data"
PAGES = "docs/performance"
SHIPPED = "sparsebert/ops/shipped.json"
BEGIN, END = "<!-- performance -->", "<!-- /performance -->"
RUN_NAME = re.compile(r"\d{4}-\d\d-\d\d-[0-9a-f]{7}\.jsonl")

NO_FIGURES = (
    "No GPU figures exist yet, so none are shown. `sparsebert bench` measures [your own shapes](docs/benchmarks.md)."
)
FIGURES = (
    "Made from the newest runs of each GPU in `benchmarks/data` by `benchmarks/report.py`. [What the words\n"
    "mean](docs/benchmarks.md), and how to measure your own shapes."
)


@dataclass(frozen=True)
class Made:
    """What the data give: files with their texts, and plots whose files stand in ``PAGES``."""

    texts: dict[Path, str]
    plots: list[plots.Plot]


def read_runs(data: Path) -> list[records.Run]:
    """Every run under ``data``; ``ValueError`` for one that is not where its own record puts it."""
    files = sorted(file for file in data.glob("*/*.jsonl") if RUN_NAME.fullmatch(file.name))
    runs = [records.read(file) for file in files]
    for run in runs:
        if run.path != (place := records.place(run, data)):
            raise ValueError(f"{run.path}: by its record it belongs to {place}")
    return runs


def make(root: Path) -> Made:
    runs = read_runs(root / DATA)
    devices = [device for device in page.devices(runs) if device.on_gpu]
    texts, drawn, sections = {}, [], []
    for device in devices:
        whole = page.markdown(device, published=LINES, level=1, images="")
        texts[root / PAGES / f"{device.slug}.md"] = whole
        brief = page.markdown(device, published=LINES, level=3, images=f"{PAGES}/", full=False)
        sections.append(f"{brief}\n[All tables of this GPU]({PAGES}/{device.slug}.md).\n")
        drawn += page.plots_of(device, LINES)
    section = "\n".join([FIGURES + "\n", *sections]) if sections else NO_FIGURES + "\n"
    readme = root / "README.md"
    texts[readme] = with_section(readme.read_text(encoding="utf-8"), section)
    texts[root / SHIPPED] = measurements.as_text(choices.measured_rows(runs))
    return Made(texts, drawn)


def with_section(readme: str, section: str) -> str:
    """``readme`` with what stands between the two marks replaced."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md: expected {BEGIN} and below it {END}, once each")
    before, after = readme.partition(BEGIN)[0], readme.partition(END)[2]
    return f"{before}{BEGIN}\n{section}{END}{after}"


def files_of(root: Path, made: Made) -> list[Path]:
    """All files that belong in ``PAGES``."""
    drawn = [root / PAGES / f"{plot.name}.{kind}" for plot in made.plots for kind in plots.FORMATS]
    return [*drawn, *(file for file in made.texts if file.parent == root / PAGES)]


def strays(root: Path, made: Made) -> list[Path]:
    """Files in ``PAGES`` that no run gives any more."""
    return sorted(set((root / PAGES).glob("*.*")) - set(files_of(root, made)))


def check(root: Path) -> list[str]:
    """What is not as the data give it, a line each. Plots have to be there; how they look is not compared."""
    made = make(root)
    faults = [f"{file}: is not there" for file in files_of(root, made) if not file.exists()]
    for file, text in made.texts.items():
        if file.exists() and file.read_text(encoding="utf-8") != text:
            faults.append(f"{file}: is not what {DATA} gives; run python benchmarks/report.py")
    return [*faults, *(f"{file}: comes from no run" for file in strays(root, made))]


def write(root: Path) -> Made:
    made = make(root)
    for file in strays(root, made):
        file.unlink()
    for plot in made.plots:
        plots.save(plot, root / PAGES)
    for file, text in made.texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return made


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, say what is not as the data give it")
    parser.add_argument("--keep", metavar="FILE", type=Path, help="a finished run to put to the data first")
    parser.add_argument("--force", action="store_true", help="keep it even if the checkout had changes")
    options = parser.parse_args(arguments)
    if options.check and options.keep:
        parser.error("--check writes nothing, --keep does")
    try:
        if options.check:
            faults = check(root)
            print("\n".join(faults) or "report: all is as the data give it", file=sys.stderr if faults else sys.stdout)
            return int(bool(faults))
        if options.keep:
            print(f"report: kept as {records.keep(options.keep, root / DATA, force=options.force)}")
        made = write(root)
    except (ValueError, OSError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"report: {len(made.texts)} texts and {len(made.plots)} plots written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
