"""Losses that make a student imitate a teacher; all are scalars, differentiable in the student alone (``symmetric_kl``,
of a student with itself, in both), and computed in float32 where the tensors are of a smaller type."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(softmax(teacher / T) || softmax(student / T)) of logits ``(batch, classes)``, mean over the batch (Hinton,
    Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015)."""
    _same_shapes("kl_divergence", student, teacher)
    s, t = (F.log_softmax(widened(x) / temperature, -1) for x in (student, teacher.detach()))
    return F.kl_div(s, t, reduction="batchmean", log_target=True) * temperature**2


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) of p = softmax(first) and q = softmax(second), logits ``(..., classes)``, mean over all
    but the last dimension; differentiable in both. The consistency term of R-Drop is half of it (Liang et al.: R-Drop:
    Regularized Dropout for Neural Networks, NeurIPS 2021)."""
    _same_shapes("symmetric_kl", first, second)
    p, q = (F.log_softmax(widened(x), -1) for x in (first, second))
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """mean(-softmax(teacher / T) * log_softmax(student / T)) of logits ``(batch, classes)`` over batch *and*
    classes, as TinyBERT's code and SparseBERT's have it: 1 / classes of the usual cross entropy, and no factor T²."""
    _same_shapes("soft_cross_entropy", student, teacher)
    target = F.softmax(widened(teacher.detach()) / temperature, -1)
    return -(target * F.log_softmax(widened(student) / temperature, -1)).mean()


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over the states of their mean squared error over all entries, those of padding too, MSE(H_l of the student,
    H_l of the teacher)."""
    return _sum_of_mse("hidden_state_loss", student, teacher)


def attention_score_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Sum over the layers of MSE between attention scores ``(batch, heads, queries, keys)`` before the softmax.

    ``mask (batch, keys)`` is 0 at padding. Padding, and every score of -100 or less, counts as 0, on each side by
    itself (TinyBERT's code, and SparseBERT's): a score that only one side hides still differs from the other's.
    """
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"attention_score_loss: mask has shape {tuple(mask.shape)}, expected (batch, keys)")
    return _sum_of_mse(
        "attention_score_loss", [_visible(s, mask) for s in student], [_visible(t, mask) for t in teacher]
    )


def attention_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """q kᵀ / sqrt(head size) of the outputs of the query and key layers, ``(batch, tokens, hidden)`` each ->
    ``(batch, heads, tokens, tokens)``; no mask is added."""
    if query.dim() != 3 or query.shape[-1] % heads:
        raise ValueError(
            f"attention_scores: query has shape {tuple(query.shape)}, expected (batch, tokens, hidden) with hidden a "
            f"multiple of {heads} heads"
        )
    size = query.shape[-1] // heads
    q, k = (x.unflatten(-1, (heads, size)).transpose(-3, -2) for x in (query, key))
    return q @ k.transpose(-2, -1) / math.sqrt(size)


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 where its type is smaller, else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _visible(scores: Tensor, mask: Tensor | None) -> Tensor:
    hidden = scores <= -100
    if mask is not None:
        hidden = hidden | (mask[:, None, None, :] == 0)
    return scores.masked_fill(hidden, 0.0)


def _sum_of_mse(name: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    if not student or len(student) != len(teacher):
        raise ValueError(f"{name}: {len(student)} tensors of the student and {len(teacher)} of the teacher")
    total = torch.zeros((), dtype=widened(student[0]).dtype, device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        _same_shapes(name, ours, theirs)
        total = total + F.mse_loss(widened(ours), widened(theirs.detach()))
    return total


def _same_shapes(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name}: student gives {tuple(student.shape)}, teacher {tuple(teacher.shape)}, expected the same shape"
        )
