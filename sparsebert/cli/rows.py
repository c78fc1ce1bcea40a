"""Rows of text and labels from a .tsv, .csv or .jsonl file. An error names the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LABEL_COLUMN = "label"
TEXT_COLUMNS = ("sentence1", "sentence2")
KINDS = (".tsv", ".csv", ".jsonl")


@dataclass(frozen=True)
class Row:
    """``line`` counts from 1, the header's if there is one; ``label`` is None where no label column was asked for."""

    line: int
    texts: tuple[str, ...]
    label: str | None = None


def read_rows(
    file: Path, text_columns: Sequence[str] | None, label_column: str | None, *, limit: int | None = None
) -> list[Row]:
    """The first ``limit`` rows of ``file``: UTF-8 with a header line; .tsv is split on tabs without quoting, .csv is
    read with quoting; .jsonl has no header but an object a line, all with the same keys. ``text_columns`` None takes
    sentence1, and sentence2 where there is one.

    ``ValueError`` for another kind of file, a column that is not there, a row of another width, and no rows at all.
    """
    kind = file.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"{file}: expected a file named {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: is not UTF-8 ({error.reason})") from None
    lines = _tsv(text) if kind == ".tsv" else _csv(text, file) if kind == ".csv" else _jsonl(text, file)
    _, header = next(lines, (1, []))
    if text_columns is None:
        text_columns = TEXT_COLUMNS if TEXT_COLUMNS[1] in header else TEXT_COLUMNS[:1]
    wanted = [*text_columns, *([] if label_column is None else [label_column])]
    for name in wanted:
        if header.count(name) != 1:
            how = "has no column" if name not in header else "has more than one column"
            raise ValueError(f"{file}: {how} {name!r}; its columns: {', '.join(header) or 'none'}")
    places = [header.index(name) for name in wanted]
    rows = []
    for line, cells in lines:
        if len(cells) != len(header):
            raise ValueError(f"{file}, line {line}: has {len(cells)} columns, expected {len(header)} as in the header")
        picked = [cells[place] for place in places]
        label = None if label_column is None else picked.pop()
        rows.append(Row(line, tuple(picked), label))
        if len(rows) == limit:
            break
    if not rows:
        raise ValueError(f"{file}: holds no rows{'' if kind == '.jsonl' else ' below its header'}")
    return rows


def label_ids(rows: Sequence[Row], names: Sequence[str], file: Path) -> list[int]:
    """Every label as a class number: written as such, or as one of ``names``, the model's own labels."""
    known = {**{name: i for i, name in enumerate(names)}, **{str(i): i for i in range(len(names))}}
    found = []
    for row in rows:
        label = (row.label or "").strip()
        if label not in known:
            raise ValueError(
                f"{file}, line {row.line}: label is {row.label!r}, expected 0 to {len(names) - 1} or one of the "
                f"model's labels ({', '.join(names)})"
            )
        found.append(known[label])
    return found


def _tsv(text: str) -> Iterator[tuple[int, list[str]]]:
    # Not splitlines: it breaks at characters that are text here.
    for number, line in enumerate(text.rstrip("\r\n").split("\n"), 1):
        yield number, line.removesuffix("\r").split("\t")


def _csv(text: str, file: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}, line {line}: {error}") from None


def _jsonl(text: str, file: Path) -> Iterator[tuple[int, list[str]]]:
    """The keys of the first object as a header, then the values of each."""
    header: list[str] = []
    if not text.strip():
        return
    for number, line in enumerate(text.rstrip("\r\n").split("\n"), 1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{file}, line {number}: is no JSON") from None
        if not isinstance(found, dict):
            raise ValueError(f"{file}, line {number}: is {type(found).__name__}, expected an object")
        if not header:
            header = list(found)
            yield 0, header
        if stray := sorted(found.keys() ^ header):
            how = "has no" if stray[0] in header else "alone has a"
            raise ValueError(f"{file}, line {number}: {how} {stray[0]!r}; all lines need the same keys")
        for key in header:
            if not isinstance(found[key], str | int | float):
                raise ValueError(f"{file}, line {number}: {key!r} is neither text nor a number")
        yield number, [found[key] if isinstance(found[key], str) else json.dumps(found[key]) for key in header]
