"""Attention of sequences that lie in one row, for a stock transformers model.

A model whose attention is ``NAME`` takes ``input_ids (1, tokens)`` of all sequences, ``position_ids`` that start at 0
with each, ``cu_seq_lens_q int32 (sequences + 1)``, where each begins, and ``max_length_q``. transformers hands what its
models do not know down to the attention; it makes no mask for a name without a mask function.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    Torch's flash attention on a GPU, for 16-bit numbers only (``RuntimeError``), and a loop over the sequences
    elsewhere. ``ValueError`` for a mask, a batch, or another scaling.
    """
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            f"{NAME}: query has shape {tuple(query.shape)}, expected a batch of 1 row without an attention mask"
        )
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        raise ValueError(f"{NAME}: scaling is {scaling}, expected 1 / sqrt({query.shape[-1]})")
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # (tokens, heads, d)
    attend = _flash if query.is_cuda else _one_by_one
    return attend(q, k, v, cu_seq_lens_q, max_length_q)[None], None


def _flash(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"{NAME}: varlen_attn takes float16 or bfloat16, not {q.dtype}")
    from torch.nn.attention.varlen import varlen_attn

    # Nothing but what every version of it takes: the scale it has by default is ours.
    y: Any = varlen_attn(q, k, v, ends, ends, longest, longest)
    return y


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    counts = ends.diff().tolist()
    parts = zip(*(x.transpose(0, 1).split(counts, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=1).transpose(0, 1)
