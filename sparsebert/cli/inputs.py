"""From rows of text to a model's inputs: cut at what the model takes, padded to the longest of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsebert.cli.common import Report
from sparsebert.cli.rows import Row

if TYPE_CHECKING:
    import torch

# What eval and compress cut the docstrings of the standard library at, as the demo does.
STDLIB_LENGTH = 128
_CHUNK = 512
# Position embeddings of these start behind the padding index.
_SHIFTED_POSITIONS = ("roberta", "xlm-roberta")


def cut_length(asked: int | None, config: Any, tokenizer: Any, name: str) -> int:
    """Tokens to cut at: what was asked for, else the most that the model's position embeddings take.

    ``ValueError`` where more was asked for than the model takes.
    """
    most = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if getattr(config, "model_type", None) in _SHIFTED_POSITIONS:
        most -= config.pad_token_id + 1
    if asked is not None and asked > most:
        raise ValueError(f"{name}: takes at most {most} tokens, but --max-length is {asked}")
    return min(most, tokenizer.model_max_length) if asked is None else asked


def tokenize(
    tokenizer: Any, rows: Sequence[Row], length: int, report: Report
) -> tuple[dict[str, list[list[int]]], int]:
    """The model's inputs by name, a list of ids for each row, and how many rows were longer than ``length``."""
    from sparsebert.cli.models import quiet_transformers

    inputs: dict[str, list[list[int]]] = {}
    cut = 0
    with quiet_transformers():
        for start in range(0, len(rows), _CHUNK):
            report(start, len(rows), "tokenizing")
            part = rows[start : start + _CHUNK]
            encoded = tokenizer(*_columns(part), truncation=True, max_length=length)
            for key, values in encoded.items():
                inputs.setdefault(key, []).extend(values)
            # Cut or just as long? Only those at the limit have to be asked.
            full = [row for row, ids in zip(part, encoded["input_ids"], strict=True) if len(ids) == length]
            if full:
                longer = tokenizer(*_columns(full), truncation=True, max_length=length + 1)["input_ids"]
                cut += sum(len(ids) > length for ids in longer)
    return inputs, cut


def pad(tokenizer: Any, inputs: dict[str, list[list[int]]]) -> dict[str, torch.Tensor]:
    """Tensors of the rows of ``inputs``, padded to the longest of them."""
    from sparsebert.cli.models import quiet_transformers

    with quiet_transformers():
        return dict(tokenizer.pad(inputs, return_tensors="pt"))


def _columns(rows: Sequence[Row]) -> list[list[str]]:
    return [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
