"""The data of a task: rows to train on, rows to choose settings by, and the dev set that is only measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsebert.cli import data as reading
from sparsebert.cli import recipes
from sparsebert.cli.inputs import tokenize
from sparsebert.cli.training import Examples

# Held out of train: a tenth, and no more than that.
MOST_HELD_OUT = 1000


@dataclass(frozen=True)
class Task:
    """``metric`` is what the task is judged by."""

    name: str
    metric: str
    classes: tuple[str, ...]
    train: Examples
    holdout: Examples
    dev: Examples


def load(folder: Path, tokenizer: Any, max_length: int) -> Task:
    """The task in ``folder``, by its name, with train.tsv and dev.tsv. Which rows are held out depends on their number
    alone. ``ValueError`` for regression and for files that cannot be read."""
    data = reading.read(str(folder), None, None, "label")
    if data.classes is None:
        raise ValueError(f"{folder}: is a regression, which the study does not have")
    train, held = split(len(data.train.rows))

    def examples(part: reading.Part) -> Examples:
        inputs, _ = tokenize(tokenizer, part.rows, max_length, lambda done, total, text: None)
        return Examples(tokenizer, inputs, data.labels(part))

    parts = [
        reading.Part([data.train.rows[i] for i in train], data.train.place),
        reading.Part([data.train.rows[i] for i in held], data.train.place),
        data.dev,
    ]
    return Task(folder.name, metric_of(folder.name), data.classes, *map(examples, parts))


def split(rows: int) -> tuple[list[int], list[int]]:
    """Which of so many rows are trained on, and which are held out, each in the order of the file."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    count = min(MOST_HELD_OUT, rows // 10)
    if not count:
        raise ValueError(f"has {rows} rows to train on, expected at least 10 to hold some out")
    return sorted(order[count:]), sorted(order[:count])


def metric_of(name: str) -> str:
    """What a task of GLUE is judged by, accuracy for any other."""
    known = recipes.tasks().get(name.lower().replace("-", ""))
    return known.metric if known is not None else "accuracy"
