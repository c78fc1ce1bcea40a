"""The embeddings of BERT and its family, summed and normalized in one op.

``embed_layer_norm(input_ids, position_ids, token_type_ids, words, positions, token_types, weight, bias, eps) -> y``:
y = LayerNorm(words[input_ids] + token_types[token_type_ids] + positions[position_ids]) over the last dimension, as
``add_layer_norm`` normalizes. Of 16-bit tables the sums and all that follows are in fp32, and only y is rounded.

**An id that its table lacks**, negative ones included: the reference is torch's embedding, which raises ``IndexError``
on a CPU and fails an assertion on a GPU. Triton's kernel, which cannot raise, reads nothing for it and gives that token
a row of NaN; no other is touched. No gradients: an inference path.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.formats.common import DTYPES
from sparsebert.ops import inference, reference, select
from sparsebert.ops.devices import describe
from sparsebert.ops.layer_norm import check_norm, normalize, widened
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import RowsSpec

OP = "embed_layer_norm"


class Arguments(NamedTuple):
    """Those of the op, as ``embed_layer_norm`` describes them."""

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None
    words: Tensor
    positions: Tensor
    token_types: Tensor | None
    weight: Tensor
    bias: Tensor
    eps: float


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    words: Tensor,
    positions: Tensor,
    token_types: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """Ids int64 or int32 of one shape, tables ``(entries, features)`` of one float dtype, ``weight`` and ``bias
    (features)`` in any -> y of that shape and ``features``, contiguous, in the tables' dtype. ``token_type_ids`` and
    ``token_types`` are both None where a model has none. ``ValueError`` or ``TypeError`` where they do not fit,
    ``RuntimeError`` where a gradient is asked for."""
    return torch.ops.sparsebert.embed_layer_norm(
        input_ids, position_ids, token_type_ids, words, positions, token_types, weight, bias, eps
    )


def define(library: torch.library.Library) -> None:
    """Defines the op with its fake."""
    inference.define(
        library,
        f"{OP}(Tensor input_ids, Tensor position_ids, Tensor? token_type_ids, Tensor words, Tensor positions, "
        "Tensor? token_types, Tensor weight, Tensor bias, float eps) -> Tensor",
        _embed_layer_norm,
        _embed_layer_norm_fake,
    )


def _check(given: Arguments) -> None:
    input_ids, position_ids, token_type_ids, words, positions, token_types = given[:6]
    if (token_type_ids is None) != (token_types is None):
        there, missing = (
            ("token_types", "token_type_ids") if token_type_ids is None else ("token_type_ids", "token_types")
        )
        raise ValueError(f"{OP}: {there} comes without {missing}, expected both or neither")
    if words.dim() != 2:
        raise ValueError(f"{OP}: words has shape {tuple(words.shape)}, expected (entries, features)")
    if words.dtype not in DTYPES:
        raise TypeError(f"{OP}: words is {words.dtype}, expected a floating-point tensor of 16, 32 or 64 bits")
    for name, table in (("positions", positions), ("token_types", token_types)):
        if table is None:
            continue
        if table.dim() != 2 or table.shape[1] != words.shape[1]:
            raise ValueError(f"{OP}: {name} has shape {tuple(table.shape)}, expected (entries, {words.shape[1]})")
        if table.dtype != words.dtype:
            raise TypeError(f"{OP}: {name} is {table.dtype}, expected {words.dtype} as words")
        if table.device != words.device:
            raise ValueError(f"{OP}: {name} is on {table.device}, expected {words.device} as words")
    for name, ids in (("input_ids", input_ids), ("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if ids is None:
            continue
        if ids.shape != input_ids.shape:
            raise ValueError(
                f"{OP}: {name} has shape {tuple(ids.shape)}, expected {tuple(input_ids.shape)} as input_ids"
            )
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{OP}: {name} is {ids.dtype}, expected torch.int64 or torch.int32")
        if ids.device != words.device:
            raise ValueError(f"{OP}: {name} is on {ids.device}, expected {words.device} as words")
    check_norm(OP, words, "words", given.weight, given.bias, given.eps)


def _embed_layer_norm(*arguments: Any) -> Tensor:
    given = Arguments(*arguments)
    _check(given)
    words = given.words
    spec = RowsSpec(OP, words.shape[1])
    problem = Problem(NEUTRAL, describe(words.device), words.dtype, spec, given.input_ids.numel(), "none")
    return select.choose_between(problem).candidate.run(given)


def _embed_layer_norm_fake(*arguments: Any) -> Tensor:
    given = Arguments(*arguments)
    _check(given)
    return given.words.new_empty((*given.input_ids.shape, given.words.shape[1]))


def _reference(given: Arguments) -> Tensor:
    # In the order of transformers, which shows in the last bit.
    z = widened(F.embedding(given.input_ids, given.words))
    if given.token_type_ids is not None and given.token_types is not None:
        z = z + widened(F.embedding(given.token_type_ids, given.token_types))
    z = z + widened(F.embedding(given.position_ids, given.positions))
    return normalize(z, given.weight, given.bias, given.eps).to(given.words.dtype)


select.add_candidate(Candidate(OP, NEUTRAL, "reference", "by torch's own ops", reference.always, _reference))
