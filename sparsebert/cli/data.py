"""What to train on: rows of text and labels from a folder, a file or a data set of the hub, and their classes."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebert.cli.common import few
from sparsebert.cli.rows import KINDS, TEXT_COLUMNS, Row, label_ids, read_rows

# What the two sets are called, in folders and on the hub; the first that is there is taken.
TRAIN = ("train",)
DEV = ("dev", "validation", "dev_matched", "validation_matched")
_MOST_CLASSES = 1000


@dataclass(frozen=True)
class Part:
    """``place`` is what an error names: the file, or the data set's name and part."""

    rows: list[Row]
    place: Path


@dataclass(frozen=True)
class Data:
    """``classes`` are the labels in the order of their numbers, None for regression."""

    name: str
    train: Part
    dev: Part
    classes: tuple[str, ...] | None

    def labels(self, part: Part, names: Sequence[str] | None = None) -> list[Any]:
        """Class numbers, or floats for regression. ``names``: those of a model's own head, in its order."""
        if self.classes is None:
            return [_number(row, part.place) for row in part.rows]
        return label_ids(part.rows, names or self.classes, part.place)

    def fingerprint(self) -> str:
        """Changes with any text or label: a training goes on with the data that it began with."""
        digest = hashlib.sha256()
        for part in (self.train, self.dev):
            for row in part.rows:
                digest.update(repr((row.texts, row.label)).encode())
            digest.update(b"\0")
        return digest.hexdigest()[:16]


def read(
    source: str,
    dev: Path | None,
    text_columns: Sequence[str] | None,
    label_column: str,
    *,
    regression: bool | None = None,
    limit: int | None = None,
) -> Data:
    """The data that ``source`` names: a folder with train and dev files, a file of training rows with ``dev`` beside
    it, or a data set of the hub as NAME or NAME:CONFIGURATION. ``regression`` None: where a label is a fraction.

    ``limit``: only the first training rows. ``ValueError`` naming what is missing or malformed.
    """
    path = Path(source).expanduser()
    if text_columns is not None and not 1 <= len(text_columns) <= 2:
        raise ValueError(f"text columns are {', '.join(text_columns)}; a model takes one or two")
    if path.is_dir():
        parts = [_file_of(path, TRAIN), dev or _file_of(path, DEV)]
    elif path.is_file():
        if dev is None:
            raise ValueError(f"{source}: is one file; give the rows to evaluate on too, with --dev FILE")
        parts = [path, dev]
    elif re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source) and path.suffix not in KINDS:
        if dev is not None:
            raise ValueError(f"{source}: a data set of the hub has rows to evaluate on; --dev goes with a file")
        return _checked(source, *_from_hub(source, text_columns, label_column, limit), regression)
    else:
        raise ValueError(f"{source}: there is no such file or folder")
    train_rows = read_rows(parts[0], text_columns, label_column, limit=limit)
    dev_rows = read_rows(parts[1], text_columns, label_column)
    return _checked(source, Part(train_rows, parts[0]), Part(dev_rows, parts[1]), regression)


def classes_of(part: Part) -> tuple[str, ...]:
    """The classes of a part's labels: 0 to n - 1 where they are numbers, else the names in alphabetical order."""
    found = {(row.label or "").strip() for row in part.rows}
    if "" in found:
        line = next(row.line for row in part.rows if not (row.label or "").strip())
        raise ValueError(f"{part.place}, line {line}: has no label")
    if not 2 <= len(found) <= _MOST_CLASSES:
        raise ValueError(f"{part.place}: has {len(found)} different labels, expected 2 to {_MOST_CLASSES}")
    if not all(re.fullmatch(r"[+-]?\d+", label) for label in found):
        return tuple(sorted(found))
    # Any other numbers would be read as others by whoever meets the model later, as a label's number.
    expected = tuple(str(i) for i in range(len(found)))
    if stray := sorted(found - set(expected)):
        raise ValueError(
            f"{part.place}: labels are the numbers {few(sorted(found, key=int))}, of which {stray[0]} is none of 0 to "
            f"{len(found) - 1}; expected those, or names"
        )
    return expected


def _checked(name: str, train: Part, dev: Part, regression: bool | None) -> Data:
    if regression is None:
        regression = _is_fraction(train)
    data = Data(name, train, dev, None if regression else classes_of(train))
    # Before anything is loaded or trained.
    for part in (train, dev):
        data.labels(part)
    return data


def _is_fraction(part: Part) -> bool:
    fractions = False
    for row in part.rows:
        label = (row.label or "").strip()
        if re.fullmatch(r"[+-]?\d+", label):
            continue
        if not re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?", label):
            return False
        fractions = True
    return fractions


def _number(row: Row, place: Path) -> float:
    try:
        value = float(row.label or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{place}, line {row.line}: label is {row.label!r}, expected a number")
    return value


def _file_of(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        found = [file for kind in KINDS if (file := folder / f"{name}{kind}").is_file()]
        if len(found) > 1:
            raise ValueError(f"{folder}: has both {found[0].name} and {found[1].name}; give one as a file")
        if found:
            return found[0]
    wanted = ", ".join(f"{names[0]}{kind}" for kind in KINDS)
    raise ValueError(f"{folder}: has no {names[0]} set; expected one of {wanted}")


def _from_hub(
    source: str, text_columns: Sequence[str] | None, label_column: str, limit: int | None
) -> tuple[Part, Part]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{source}: there is no such file or folder; reading a data set of that name from the hub takes datasets, "
            f"which is not installed: pip install 'sparsebert[train]'"
        ) from None
    name, _, configuration = source.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source}: there is no such file or folder, and the hub did not give it: {reason}") from None
    parts = []
    for names, most in ((TRAIN, limit), (DEV, None)):
        part = next((name for name in names if name in found), None)
        if part is None:
            raise ValueError(f"{source}: has no {names[0]} set; its parts: {', '.join(found)}")
        parts.append(_part(source, part, found[part], text_columns, label_column, most))
    return parts[0], parts[1]


def _part(
    source: str, name: str, rows: Any, text_columns: Sequence[str] | None, label_column: str, limit: int | None
) -> Part:
    place = Path(f"{source}, {name}")
    columns = list(rows.column_names)
    if text_columns is None:
        both = [column for column in TEXT_COLUMNS if column in columns]
        text_columns = both or [column for column in ("sentence", "text") if column in columns][:1] or TEXT_COLUMNS[:1]
    for column in (*text_columns, label_column):
        if column not in columns:
            raise ValueError(f"{place}: has no column {column!r}; its columns: {', '.join(columns)}")
    names = getattr(rows.features[label_column], "names", None)
    found = []
    for line, row in enumerate(rows, 1):
        label = row[label_column]
        if names is not None and not 0 <= label < len(names):
            raise ValueError(f"{place}, row {line}: has no label")
        found.append(Row(line, tuple(str(row[column]) for column in text_columns), str(label)))
        if len(found) == limit:
            break
    if not found:
        raise ValueError(f"{place}: holds no rows")
    return Part(found, place)
