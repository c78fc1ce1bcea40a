"""Attention of sequences that lie in one row, for a stock transformers model.

A model whose attention is ``NAME`` takes ``input_ids (1, tokens)`` of all sequences, ``position_ids`` that start at 0
with each, ``cu_seq_lens_q int32 (sequences + 1)``, where each begins, and ``max_length_q``. transformers hands what its
models do not know down to the attention; it makes no mask for a name without a mask function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsebert import ops

__all__ = ["NAME", "describe", "register", "unpadded_attention"]

NAME = "sparsebert_unpadded"


def register() -> None:
    """Makes ``NAME`` known to transformers; again does nothing more."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, unpadded_attention)


def describe(device: torch.device) -> str:
    """What ``unpadded_attention`` runs there."""
    return "varlen_attn" if device.type == "cuda" else "sdpa, one sequence at a time"


def unpadded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(q kᵀ / sqrt(d)) v within each sequence: ``(1, heads, tokens, d)`` each -> ``(1, tokens, heads, d)``.

    By ``ops.varlen_attention``. ``ValueError`` for a mask, a batch, or another scaling.
    """
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            f"{NAME}: query has shape {tuple(query.shape)}, expected a batch of 1 row without an attention mask"
        )
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        raise ValueError(f"{NAME}: scaling is {scaling}, expected 1 / sqrt({query.shape[-1]})")
    # (tokens, heads * d), which is how the model made them.
    q, k, v = (part[0].transpose(0, 1).flatten(1) for part in (query, key, value))
    y = ops.varlen_attention(q, k, v, cu_seq_lens_q, heads=query.shape[1], max_length=max_length_q)
    return y.view(1, len(y), query.shape[1], -1), None
