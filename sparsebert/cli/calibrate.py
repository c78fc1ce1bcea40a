"""Text for ``sparsebert.calibrate``: what flows through static int8 layers while their input scales are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsebert.calibration import METHODS
from sparsebert.cli.common import Report
from sparsebert.cli.inputs import STDLIB_LENGTH, cut_length, pad, tokenize
from sparsebert.cli.rows import Row, read_rows

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

DEFAULT_METHOD = METHODS[0]
# Some hundred texts settle the scales; more only take time.
MOST_ROWS = 512
BATCH_SIZE = 16


@dataclass(frozen=True)
class Text:
    """Where the text comes from: a .tsv or .csv ``file`` (``columns`` as in ``rows.read_rows``), or, where it is None,
    the docstrings of the standard library that `sparsebert eval --stdlib` does not measure on."""

    file: Path | None
    columns: Sequence[str] | None = None
    method: str = DEFAULT_METHOD

    @property
    def name(self) -> str:
        return "docstrings of the Python standard library" if self.file is None else str(self.file)

    def read(self, report: Report) -> list[Row]:
        """All rows; ``ValueError`` as ``read_rows`` raises it, or for more than two columns."""
        if self.file is not None:
            if self.columns is not None and not 1 <= len(self.columns) <= 2:
                raise ValueError(f"text columns are {', '.join(self.columns)}; calibration takes one or two")
            return read_rows(self.file, self.columns, None)
        from sparsebert.bench.docstrings import read_pairs, split_pairs

        pairs = read_pairs(progress=lambda done, total: report(done, total, "reading the standard library"))
        return [Row(0, (text,)) for text in split_pairs(pairs).training_texts()]


def calibrate(
    network: Any, tokenizer: Any, rows: Sequence[Row], text: Text, name: str, report: Report
) -> dict[str, Any]:
    """Measures the input scales of the static layers of ``network`` on ``rows``, at most ``MOST_ROWS`` of them, spread
    evenly over all; returns what was done.

    A model with a head takes two columns as one input, as it was trained; a bare encoder takes each text by itself.
    """
    import sparsebert

    used = spread(rows, MOST_ROWS)
    length = cut_length(None, network.config, tokenizer, name)
    if text.file is None:
        length = min(length, STDLIB_LENGTH)
    if network.base_model is network:
        used = [Row(row.line, (part,)) for row in used for part in row.texts]
    inputs, cut = tokenize(tokenizer, used, length, report)
    found = sparsebert.calibrate(network, _batches(tokenizer, inputs, report), text.method)
    return {
        "data": text.name,
        "method": text.method,
        "rows": len(rows),
        "rows_used": min(len(rows), MOST_ROWS),
        "texts_cut": cut,
        "max_length": length,
        "batches": found.batches,
        "layers": found.to_dict()["layers"],
    }


def spread(rows: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of ``rows`` at even distances: files are often sorted by label."""
    count = min(len(rows), most)
    return [rows[i * len(rows) // count] for i in range(count)]


def _batches(tokenizer: Any, inputs: dict[str, list[list[int]]], report: Report) -> Iterator[dict[str, Tensor]]:
    """Rows of one length together: padding would be counted with the rest, and its numbers matter to nobody."""
    places: dict[int, list[int]] = {}
    for place, ids in enumerate(inputs["input_ids"]):
        places.setdefault(len(ids), []).append(place)
    batches = [
        found[start : start + BATCH_SIZE] for found in places.values() for start in range(0, len(found), BATCH_SIZE)
    ]
    for done, indices in enumerate(batches):
        report(done, len(batches), "calibrating")
        yield pad(tokenizer, {key: [values[i] for i in indices] for key, values in inputs.items()})
