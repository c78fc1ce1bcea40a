"""Triton's candidate for ``embed_layer_norm``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsebert.ops import embeddings, select
from sparsebert.ops.embeddings import Arguments
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.select import Candidate
from sparsebert.ops.triton.layer_norm import DESCRIPTION, refusal_of_rows
from sparsebert.ops.triton.support import rows_of


def _embed_layer_norm(given: Arguments) -> Tensor:
    from sparsebert.kernels.embeddings import embed_layer_norm

    ids = (None if one is None else one.reshape(-1).contiguous() for one in given[:3])
    tables = (None if table is None else rows_of(table) for table in given[3:6])
    arguments: Any = (*ids, *tables, given.weight.contiguous(), given.bias.contiguous(), given.eps)
    y = embed_layer_norm(*arguments)
    return y.view(*given.input_ids.shape, given.words.shape[1])


select.add_candidate(Candidate(embeddings.OP, NEUTRAL, "triton", DESCRIPTION, refusal_of_rows, _embed_layer_norm))
