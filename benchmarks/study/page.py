"""The study as README and docs/accuracy.md have it."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from sparsebert.bench.records import label
from sparsebert.bench.report.tables import NOTHING, Table
from study import claims, plots, tables
from study.rows import Study

PAGE, IMAGES = "docs/accuracy.md", "docs/accuracy"
NO_STUDY = "No accuracy study was run yet, so no figures are shown.\n"

_INTRODUCTION = f"""\
Made from `benchmarks/data/accuracy` by `benchmarks/report.py`: the metric times 100 with its standard deviation over
seeds, and differences of pairs of the same seed with 95 % intervals. `+kd`: with a teacher that the paper has not. [All
tables, ablations and claims, and how to read them]({PAGE}).
""".strip()
_READING = """\
Metrics are those of the whole dev set, times 100, of the model as it was packed and loaded again; ± is the standard
deviation over seeds. Nothing was chosen by the dev set: learning rates are chosen on the first seed by rows held out of
the training set, and ablations take the rate of the arm that they change. A difference is the mean over pairs of the
same seed, in points (hundredths), with the 95 % interval of Student's t; one pair has none. Intervals of two or three
seeds are wide; pairs of one task are not quite independent of each other, which makes those of claims somewhat too
narrow.

A claim's pairs are all tasks, seeds and sparsities that both arms have. It is *supported* where the interval of the
mean difference lies above 0 and the mean is above 0 on at least three quarters of the tasks, *refuted* where the same
holds below 0, and *undecided* otherwise; of several comparisons all have to hold, and one refuted refutes the claim.
What is refuted here is refuted for this model and in so many steps, not where its paper trained. The commands write to
a file of their own: `run` does not do again what it finds done.

*Over dense* is over the better of the dense arms by held-out rows. *Encoder on disk*: bytes of the encoder's linear
layers as packed, of those of the dense ones. *Time* is over that of dense, taken in turns with it: above 1 is slower.
*(one class)*: the model predicts one class for every row, it has collapsed. *Teacher*: whether the paper has one, or it
was added by us (arms that end in `+kd`). *(1 of 3 rates)*: other rates of the grid were not run yet. Formats are
written as `--format` takes them:

```pycon
>>> from sparsebert.configs import parse_config
>>> parse_config("2:4"), parse_config("low-rank:0.25")
(NMConfig(n=2, m=4, columns=None), LowRankConfig(rank=None, ratio=0.25))

```
"""
_MAIN = "By sparsity, the best mean first."
_RATES = "The metric on held-out rows of the training set, first seed; the rate that was chosen is bold."
_SPECTRA = (
    "Per cent of the full rank or of all rows and columns, means over layers and seeds. Shuffled: the same weights in "
    "other places, as many in each row and in each column."
)
_TRUNCATED = "The metric after the trained weights were truncated to a low rank, without training."
_INT8 = "The same weights in int8, activations quantized as they come, beside floats."
_CLAIMS = "What the papers claim, in our words."
_TARGETS = "What we set out to reach. A mean decides, whatever its interval."
_PROVENANCE = "Each row of the data names the environment that it was measured in."


def section(studies: Sequence[Study]) -> str:
    """README's section."""
    if not studies:
        return NO_STUDY
    parts = [_INTRODUCTION]
    for study in studies:
        parts += [f"### Budget {study.budget}", _counts(study)]
        for task in study.tasks:
            if table := tables.brief(study, task).markdown():
                parts += [f"<details><summary>{task}</summary>", table, "</details>"]
    return "\n\n".join(parts) + "\n"


def markdown(studies: Sequence[Study]) -> str:
    """docs/accuracy.md."""
    parts = ["# Accuracy", _wrapped(_origin(studies)), "## How to read it", _READING.strip()]
    for study in studies:
        parts += _budget(study)
    parts += _table("## Arms", "", tables.arms(studies))
    parts += _table("## Provenance", _PROVENANCE, _provenance(studies))
    return "\n\n".join(part for part in parts if part) + "\n"


def _budget(study: Study) -> list[str]:
    found, targets = claims.verdicts(study), claims.targets(study)
    parts = [f"## Budget {study.budget}", _wrapped(f"{_shown(study)} {_sum(found, targets)}")]
    parts += _table("### Claims", _CLAIMS, tables.verdicts(found))
    parts += _table("### Targets", _TARGETS, tables.verdicts(targets))
    folder = IMAGES.rpartition("/")[2]
    parts += [f"![{plot.title}]({folder}/{plot.name}.svg)" for plot in plots.of(study)]
    for task in study.tasks:
        dense = claims.best_dense(study, task)
        note = f"{_MAIN} {f'Dense is `{dense}`. ' if dense else ''}{_steps(study, task)}"
        parts += _table(f"### {task}", note, tables.main(study, task))
        parts += _table(f"#### {task}: learning rates", _RATES, tables.rates(study, task))
        parts += _table(f"#### {task}: ranks", _SPECTRA, tables.spectra(study, task))
        parts += _table(f"#### {task}: truncation", _TRUNCATED, tables.truncated(study, task))
        parts += _table(f"#### {task}: int8 on top", _INT8, tables.int8(study, task))
    return parts


def _table(title: str, note: str, table: Table) -> list[str]:
    """Nothing where the table has no line."""
    return [title, _wrapped(note), table.markdown()] if table.lines else []


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _origin(studies: Sequence[Study]) -> str:
    files = ", ".join(f"`benchmarks/data/accuracy/{study.budget}.jsonl`" for study in studies)
    return f"Every arm of the accuracy study, made from {files} by `python benchmarks/report.py accuracy`."


def _shown(study: Study) -> str:
    """How many of the rows are in the tables, and what is wrong with any of them."""
    rows = [row for task in study.tasks for place in study.arms(task) for row in study.of(task, *place).values()]
    total, strays = len(study.accuracy), sum(row.get("reload_agrees") is False for row in rows)
    rest = f"; the other {total - len(rows)} are of learning rates that were not chosen" if total > len(rows) else ""
    wrong = f" **Packed and loaded again, {strays} of them give other predictions.**" if strays else ""
    return f"{total} runs, of which {len(rows)} are in the tables{rest}.{wrong}"


def _steps(study: Study, task: str) -> str:
    """How many optimizer steps the arms had, which should be as many."""
    rows = (row for row in study.accuracy if row["task"] == task and row["arm"] in tables.ARMS)
    trained = (row for row in rows if tables.ARMS[row["arm"]].trained)
    counts = sorted({row["budget_steps"] for row in trained if row.get("budget_steps") is not None})
    if not counts:
        return ""
    text = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return f"Optimizer steps of each trained arm, with those of its start: {text}."


def _counts(study: Study) -> str:
    found = claims.verdicts(study), claims.targets(study)
    return _wrapped(f"{_sum(*found)} [Each of them]({PAGE}) has a command that measures it again.")


def _sum(found: Sequence[claims.Verdict], targets: Sequence[claims.Verdict]) -> str:
    outcomes = [Counter(one.outcome for one in some) for some in (found, targets)]
    of_claims = _enumerated(outcomes[0], (claims.SUPPORTED, claims.REFUTED, claims.UNDECIDED))
    of_targets = _enumerated(outcomes[1], (claims.REACHED, claims.MISSED))
    return f"Of {len(found)} claims of papers {of_claims}; of our {len(targets)} targets {of_targets}."


def _enumerated(counts: Counter[str], names: Sequence[str]) -> str:
    *first, last = (f"{counts[name]} {name}" for name in (*names, claims.NOT_MEASURED))
    return f"{', '.join(first)} and {last}"


def _provenance(studies: Sequence[Study]) -> Table:
    records = {name: record for study in studies for name, record in study.environments.items()}
    rows = Counter(row["environment"] for study in studies for row in (*study.accuracy, *study.latency))
    lines = []
    for name, record in sorted(records.items(), key=lambda item: (str(item[1].get("measured")), item[0])):
        commit = str(record.get("commit") or "unknown")[:7] + (", with changes" if record.get("dirty") else "")
        day = str(record.get("measured") or NOTHING)[:10]
        versions = ", ".join(f"{what} {record[what]}" for what in ("torch", "transformers") if record.get(what))
        lines.append((name, label(record), commit, day, versions or NOTHING, str(rows[name])))
    return Table(("environment", "machine", "commit", "day", "versions", "rows"), lines)
