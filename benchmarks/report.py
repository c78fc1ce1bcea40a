"""What the repository says of its speed and accuracy, made from what lies in benchmarks/data:

    python benchmarks/report.py                     all of it
    python benchmarks/report.py performance         README's performance section, docs/performance, shipped.json
    python benchmarks/report.py accuracy            README's accuracy section, docs/accuracy.md, docs/accuracy
    python benchmarks/report.py --check             exit status 1 where one of these is not what the data give
    python benchmarks/report.py --keep rows.jsonl   first puts a finished run to the data

Of speed, only files named <day>-<commit>.jsonl are runs, and only those of GPUs are shown; accuracy/<budget>.jsonl is
the accuracy study.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
# Behind all else, where this file is imported: a study's name must not hide another's.
sys.path.append(str(ROOT / "benchmarks"))

from sparsebert.bench import records  # noqa: E402
from sparsebert.bench.models.published import LINES  # noqa: E402
from sparsebert.bench.report import choices, page, plots  # noqa: E402
from sparsebert.ops import measurements  # noqa: E402
from study import page as study_page  # noqa: E402
from study import plots as study_plots  # noqa: E402
from study.rows import studies  # noqa: E402

README = "README.md"
DATA = "benchmarks/data"
PAGES = "docs/performance"
SHIPPED = "sparsebert/ops/shipped.json"
STUDY = "accuracy"
RUN_NAME = re.compile(r"\d{4}-\d\d-\d\d-[0-9a-f]{7}\.jsonl")

NO_FIGURES = (
    "No GPU figures exist yet, so none are shown. `sparsebert bench` measures [your own shapes](docs/benchmarks.md)."
)
FIGURES = (
    "Made from the newest runs of each GPU in `benchmarks/data` by `benchmarks/report.py`. [What the words\n"
    "mean](docs/benchmarks.md), and how to measure your own shapes."
)


@dataclass(frozen=True)
class Part:
    """A section of README and what goes with it: ``section`` is its text, ``texts`` those of other files, and the files
    of ``plots`` lie in ``images``. What matches ``owned`` is made by this part alone."""

    section: str
    texts: dict[Path, str]
    plots: list[plots.Plot]
    images: Path
    owned: tuple[str, ...]


@dataclass(frozen=True)
class Made:
    """What the data give: files with their texts, plots with the folders of their files, and the files that lie where
    only these may."""

    texts: dict[Path, str]
    plots: list[tuple[Path, plots.Plot]]
    found: set[Path]


def read_runs(data: Path) -> list[records.Run]:
    """Every run under ``data``; ``ValueError`` for one that is not where its own record puts it."""
    files = sorted(file for file in data.glob("*/*.jsonl") if RUN_NAME.fullmatch(file.name))
    runs = [records.read(file) for file in files]
    for run in runs:
        if run.path != (place := records.place(run, data)):
            raise ValueError(f"{run.path}: by its record it belongs to {place}")
    return runs


def performance(root: Path) -> Part:
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
    texts[root / SHIPPED] = measurements.as_text(choices.measured_rows(runs))
    return Part(section, texts, drawn, root / PAGES, (f"{PAGES}/*.*",))


def accuracy(root: Path) -> Part:
    found = studies(root / DATA / STUDY)
    texts = {root / study_page.PAGE: study_page.markdown(found)} if found else {}
    drawn = [plot for study in found for plot in study_plots.of(study)]
    owned = (study_page.PAGE, f"{study_page.IMAGES}/*.*")
    return Part(study_page.section(found), texts, drawn, root / study_page.IMAGES, owned)


PARTS: dict[str, Callable[[Path], Part]] = {"performance": performance, "accuracy": accuracy}


def make(root: Path, names: Sequence[str] = tuple(PARTS)) -> Made:
    readme = (root / README).read_text(encoding="utf-8")
    texts: dict[Path, str] = {}
    drawn: list[tuple[Path, plots.Plot]] = []
    found: set[Path] = set()
    for name in names:
        part = PARTS[name](root)
        readme = with_section(readme, name, part.section)
        texts |= part.texts
        drawn += [(part.images, plot) for plot in part.plots]
        found |= {file for pattern in part.owned for file in root.glob(pattern)}
    texts[root / README] = readme
    return Made(texts, drawn, found)


def with_section(readme: str, name: str, section: str) -> str:
    """``readme`` with what stands between the two marks of that name replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ValueError(f"README.md: expected {begin} and below it {end}, once each")
    before, after = readme.partition(begin)[0], readme.partition(end)[2]
    return f"{before}{begin}\n{section}{end}{after}"


def files_of(made: Made) -> list[Path]:
    """All files that have to be there."""
    drawn = [folder / f"{plot.name}.{kind}" for folder, plot in made.plots for kind in plots.FORMATS]
    return [*drawn, *made.texts]


def strays(made: Made) -> list[Path]:
    """Files that no data give any more."""
    return sorted(made.found - set(files_of(made)))


def check(root: Path, names: Sequence[str] = tuple(PARTS)) -> list[str]:
    """What is not as the data give it, a line each. Plots have to be there; how they look is not compared."""
    made = make(root, names)
    faults = [f"{file}: is not there" for file in files_of(made) if not file.exists()]
    for file, text in made.texts.items():
        if file.exists() and file.read_text(encoding="utf-8") != text:
            faults.append(f"{file}: is not what {DATA} gives; run python benchmarks/report.py")
    return [*faults, *(f"{file}: comes from no run" for file in strays(made))]


def write(root: Path, names: Sequence[str] = tuple(PARTS)) -> Made:
    made = make(root, names)
    for file in strays(made):
        file.unlink()
    for folder, plot in made.plots:
        plots.save(plot, folder)
    for file, text in made.texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return made


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="only this part")
    parser.add_argument("--check", action="store_true", help="write nothing, say what is not as the data give it")
    parser.add_argument("--keep", metavar="FILE", type=Path, help="a finished run to put to the data first")
    parser.add_argument("--force", action="store_true", help="keep it even if the checkout had changes")
    options = parser.parse_args(arguments)
    if options.check and options.keep:
        parser.error("--check writes nothing, --keep does")
    if options.keep and options.part == "accuracy":
        parser.error("--keep takes runs of performance; the study's rows are kept as they are measured")
    names = [options.part] if options.part else list(PARTS)
    try:
        if options.check:
            faults = check(root, names)
            print("\n".join(faults) or "report: all is as the data give it", file=sys.stderr if faults else sys.stdout)
            return int(bool(faults))
        if options.keep:
            print(f"report: kept as {records.keep(options.keep, root / DATA, force=options.force)}")
        made = write(root, names)
    except (ValueError, OSError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"report: {len(made.texts)} texts and {len(made.plots)} plots written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
