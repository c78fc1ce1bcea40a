"""``sparsebert::varlen_attention``: y = softmax(q kᵀ / sqrt(d)) v within each of several sequences that lie one after
the other.

``varlen_attention(q, k, v, cu_seqlens, *, heads, max_length)``: ``q``, ``k`` and ``v (total, heads * d)`` in one float
dtype, maybe slices of one projection; ``cu_seqlens`` int32 ``(sequences + 1)`` from 0, where each sequence begins and
the last ends, on the same device; no sequence is longer than ``max_length``. Result ``(total, heads * d)``, contiguous.
Rows after the last sequence hold nothing of meaning.

A sequence's result does not depend on the others. On a GPU torch's flash attention for sequences of any lengths runs
in 16 bits, else sequences are padded to ``max_length`` in the op; both wait for nothing and can be captured in a CUDA
graph. On a CPU one sequence is computed after the other. No gradients: an inference path.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.ops import inference, reference, select
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import AttentionSpec

OP = AttentionSpec(1, 1).op
_SCHEMA = "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, *, int heads, SymInt max_length) -> Tensor"
# Of torch's flash attention.
_LARGEST_HEAD, _HEAD_MULTIPLE = 256, 8


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, heads: int, max_length: int) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v within each sequence; shapes as the module says.

    ``ValueError`` or ``TypeError`` naming the tensor where they do not fit, ``RuntimeError`` where a gradient is asked
    for.
    """
    return torch.ops.sparsebert.varlen_attention(q, k, v, cu_seqlens, heads=heads, max_length=max_length)


def define(library: torch.library.Library) -> None:
    """Defines the op with its fake."""
    inference.define(library, _SCHEMA, _run, _fake)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, heads: int) -> None:
    if q.dim() != 2 or heads < 1 or q.shape[1] % heads:
        raise ValueError(f"{OP}: q has shape {tuple(q.shape)}, expected (total, heads * d) with heads={heads}")
    if not q.is_floating_point():
        raise TypeError(f"{OP}: q is {q.dtype}, expected a floating-point tensor")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(f"{OP}: {name} has shape {tuple(tensor.shape)}, expected {tuple(q.shape)} as q")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{OP}: {name} is {tensor.dtype}, expected {q.dtype} as q")
        if tensor.device != q.device:
            raise ValueError(f"{OP}: {name} is on {tensor.device}, expected {q.device} as q")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{OP}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (sequences + 1,)")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{OP}: cu_seqlens is {cu_seqlens.dtype}, expected torch.int32")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{OP}: cu_seqlens is on {cu_seqlens.device}, expected {q.device} as q")


def _run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, heads: int, max_length: int) -> Tensor:
    _check(q, k, v, cu_seqlens, heads)
    problem = select.problem_of(AttentionSpec(heads, q.shape[1] // heads), NEUTRAL, q, "none")
    # (total, heads, d)
    parts = (tensor.unflatten(1, (heads, -1)) for tensor in (q, k, v))
    y: Tensor = select.choose_between(problem).candidate.run(*parts, cu_seqlens, max_length)
    return y.reshape(q.shape)


def _fake(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, heads: int, max_length: int) -> Tensor:
    _check(q, k, v, cu_seqlens, heads)
    return q.new_empty(q.shape)


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Nothing but what every version of it takes: the scale it has by default is ours.
    y: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length)
    return y


def _flash_refusal(problem: Problem) -> str | None:
    device = problem.device
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if device.capability is not None and device.capability < (8, 0):
        return f"needs compute capability 8.0, found {device.capability[0]}.{device.capability[1]}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    size = problem.spec.head_size
    if size > _LARGEST_HEAD or size % _HEAD_MULTIPLE:
        return f"needs heads of a multiple of {_HEAD_MULTIPLE} up to {_LARGEST_HEAD} features, not {size}"
    return None


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    ends = cu_seqlens.tolist()
    y = q.new_zeros(q.shape)
    for begin, end in zip(ends, ends[1:], strict=False):
        if begin < end:
            # (1, heads, length, d): torch's quickest kernels take four dimensions.
            alone = [tensor[None, begin:end].transpose(1, 2) for tensor in (q, k, v)]
            y[begin:end] = F.scaled_dot_product_attention(alone[0], alone[1], alone[2])[0].transpose(0, 1)
    return y


def _padded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    total = q.shape[0]
    if not total:
        return torch.empty_like(q)
    begins, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    steps = torch.arange(max_length, device=q.device)
    real = steps < lengths[:, None]  # (sequences, max_length)
    # What is not there is filled from the sequence itself, so that no NaN of another comes in.
    places = (begins[:, None] + torch.minimum(steps, lengths[:, None] - 1).clamp(min=0)).clamp(max=total - 1)
    q, k, v = (tensor[places].transpose(1, 2) for tensor in (q, k, v))  # (sequences, heads, max_length, d)
    # A sequence without any token would divide zero by zero; its first row is let in instead, and nobody reads it.
    keys = real | (steps == 0)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None, :]).transpose(1, 2).flatten(0, 1)
    rows = torch.arange(total, device=q.device)
    # The sequence of each row; rows after the last get some row that exists.
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), rows.int(), right=True).clamp(max=len(begins) - 1)
    return y[owner * max_length + (rows - begins[owner]).clamp(max=max_length - 1)]


def _reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    if cu_seqlens.shape[0] == 1:
        return q.new_zeros(q.shape)
    run = _one_by_one if q.device.type == "cpu" else _padded
    return run(q, k, v, cu_seqlens, max_length)


select.add_candidate(
    Candidate(OP, NEUTRAL, "torch", "torch's flash attention for sequences of any lengths", _flash_refusal, _flash)
)
select.add_candidate(
    Candidate(
        OP,
        NEUTRAL,
        "reference",
        "torch's scaled_dot_product_attention, one sequence at a time on a CPU, padded elsewhere",
        reference.always,
        _reference,
    )
)
