"""Triton's candidate for ``embed_layer_norm``."""

from __future__ import annotations

from torch import Tensor

from sparsebert.ops import embeddings, select
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.select import Candidate
from sparsebert.ops.triton.layer_norm import DESCRIPTION, refusal_of_rows
from sparsebert.ops.triton.support import rows_of


def _embed_layer_norm(
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
    from sparsebert.kernels.embeddings import embed_layer_norm

    y = embed_layer_norm(
        input_ids.reshape(-1).contiguous(),
        position_ids.reshape(-1).contiguous(),
        None if token_type_ids is None else token_type_ids.reshape(-1).contiguous(),
        rows_of(words),
        rows_of(positions),
        None if token_types is None else rows_of(token_types),
        weight.contiguous(),
        bias.contiguous(),
        eps,
    )
    return y.view(*input_ids.shape, words.shape[1])


select.add_candidate(Candidate(embeddings.OP, NEUTRAL, "triton", DESCRIPTION, refusal_of_rows, _embed_layer_norm))
