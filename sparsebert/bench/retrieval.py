"""Sentence embeddings and the retrieval measures taken from them.

Embedding: the mean of the last hidden states over the tokens the attention mask keeps, scaled to length one,
as the sentence-transformers models are meant to be used. A query's answer is the document at the same
position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RetrievalScore:
    """Means over all queries, each from 0 to 1; higher is better."""

    mrr_at_10: float
    recall_at_1: float
    queries: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """e = v / |v| with v = sum_t m_t h_t / sum_t m_t: (batch, tokens, width), (batch, tokens) -> (batch,
    width).
    """
    if hidden.dim() != 3 or attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"mean_pool: attention_mask has shape {tuple(attention_mask.shape)}, expected the first two of hidden's "
            f"three dimensions, which are {tuple(hidden.shape)}"
        )
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    return nn.functional.normalize(mean, dim=-1)


def ranks(queries: Tensor, documents: Tensor) -> Tensor:
    """Rank of document i among all documents for query i, from 1; (n, width), (n, width) -> int64 (n).

    rank_i = 1 + number of j != i with <q_i, d_j> >= <q_i, d_i>: a tie counts against the model, so that
    embeddings that are all the same score nothing.
    """
    if queries.dim() != 2 or queries.shape != documents.shape or not len(queries):
        raise ValueError(
            f"ranks: queries have shape {tuple(queries.shape)} and documents {tuple(documents.shape)}, "
            "expected the same non-empty (n, width)"
        )
    if not (torch.isfinite(queries).all() and torch.isfinite(documents).all()):
        raise ValueError("ranks: the embeddings hold NaN or Inf, expected finite numbers")
    similarity = queries.double() @ documents.double().T
    return (similarity >= similarity.diagonal().unsqueeze(1)).sum(1)


def score(queries: Tensor, documents: Tensor) -> RetrievalScore:
    """MRR@10 = mean of 1/rank where rank <= 10, else 0; recall@1 = share of queries with rank 1."""
    rank = ranks(queries, documents)
    reciprocal = torch.where(rank <= 10, 1.0 / rank.double(), 0.0)
    return RetrievalScore(reciprocal.mean().item(), (rank == 1).double().mean().item(), len(rank))


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of near-equal length, shortest first: little padding, and always the same batches."""
    if batch_size < 1:
        raise ValueError(f"length_batches: batch_size is {batch_size}, expected at least 1")
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Texts:
    """Texts as token ids, cut to `max_length` tokens, to be taken in padded batches.

    `tokenizer` is one of transformers' (called with a list of texts, and its `pad`).
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], *, max_length: int):
        if max_length < 3:
            raise ValueError(f"Texts: max_length is {max_length}, expected at least 3 (two special tokens and a word)")
        self.tokenizer = tokenizer
        self.ids: list[list[int]] = []
        if texts:
            self.ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """input_ids and attention_mask, int64 (len(indices), longest), padded on the right."""
        padded = self.tokenizer.pad({"input_ids": [self.ids[i] for i in indices]}, return_tensors="pt")
        return {name: padded[name].to(device) for name in ("input_ids", "attention_mask")}


def embed_batches(model: nn.Module, texts: Texts, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, embeddings (len(indices), width)) a batch at a time, with dropout off and without gradients."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for indices in length_batches(texts.lengths(), batch_size):
            batch = texts.batch(indices, device)
            with torch.inference_mode():
                pooled = mean_pool(model(**batch).last_hidden_state, batch["attention_mask"])
            yield indices, pooled
    finally:
        model.train(was_training)


def embed(
    model: nn.Module, texts: Texts, *, batch_size: int = 32, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Embeddings of all texts in their own order, (len(texts), width) on the CPU.

    The batches depend only on the texts and `batch_size`, so two processes with the same weights and kernels
    get the same bits. `progress` is called with (texts done, texts).
    """
    if not len(texts):
        raise ValueError("embed: there are no texts, expected at least one")
    result: Tensor | None = None
    done = 0
    for indices, pooled in embed_batches(model, texts, batch_size):
        if result is None:
            result = torch.empty(len(texts), pooled.shape[1], dtype=pooled.dtype)
        result[indices] = pooled.cpu()
        done += len(indices)
        if progress is not None:
            progress(done, len(texts))
    if result is None:
        raise ValueError("embed: the model gave no batch back, expected at least one")
    return result
