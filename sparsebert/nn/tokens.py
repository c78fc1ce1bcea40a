"""The tokens of a batch without padding, as a fused encoder takes them, and who runs it on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Tokens(NamedTuple):
    """``total`` tokens of ``sequences`` sequences, one after the other.

    ``input_ids``, ``position_ids`` and, unless the model has none, ``token_type_ids``: int64 ``(total)``.
    ``cu_seqlens`` int32 ``(sequences + 1)``, on the same device: where each begins, and the end of the last. Rows after
    that end belong to no sequence and what is computed for them means nothing. ``max_length``: no sequence is longer.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None
    cu_seqlens: Tensor
    max_length: int


# What a fused encoder computes: tokens to its last hidden states, (total, hidden).
Encode = Callable[[Tokens], Tensor]
# encoder, its own function, tokens: something else may stand between a model and its encoder.
EncodeBy = Callable[[nn.Module, Encode, Tokens], Tensor]

_encode_by: ContextVar[EncodeBy | None] = ContextVar("sparsebert_encode_by", default=None)


@contextmanager
def encoding_by(run: EncodeBy) -> Iterator[None]:
    """Fused encoders that are called in this context (of this thread) leave their tokens to ``run``."""
    token = _encode_by.set(run)
    try:
        yield
    finally:
        _encode_by.reset(token)


def encode(encoder: nn.Module, run: Encode, tokens: Tokens) -> Tensor:
    """The last hidden states ``(total, hidden)`` of ``tokens``: ``run(tokens)``, or what the context puts there."""
    if torch.compiler.is_compiling():
        # A context cannot be traced, and what is traced runs later, outside of it.
        return run(tokens)
    by = _encode_by.get()
    return run(tokens) if by is None else by(encoder, run, tokens)
