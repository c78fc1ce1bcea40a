"""The reference backend: unpack where needed, then torch's dense linear, on any device. Every other backend is held
to its numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.ops import layouts
from sparsebert.ops.activations import activate
from sparsebert.ops.select import Candidate, Problem


def always(problem: Problem) -> None:
    """``supports`` of a candidate that never refuses."""
    return None


def through_u(t: Tensor, u: Tensor, bias: Tensor | None, parts: int) -> Tensor:
    """t uᵀ + b for ``t (..., parts * rank)`` and ``u (out, rank)``: each part of u with the ranks of its own."""
    if parts == 1:
        return F.linear(t, u, bias)
    biases = [None] * parts if bias is None else bias.chunk(parts)
    return torch.cat([F.linear(*one) for one in zip(t.chunk(parts, -1), u.chunk(parts), biases, strict=True)], -1)


def unpacked(op: str, layout: str) -> Candidate:
    """The reference of a layout by its dense weight."""
    if layout == layouts.DENSE:
        return plain(op, layout)

    def run(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
        dense = layouts.get(op, layout).to_dense(weight, problem.spec, x.dtype)
        return activate(F.linear(x, dense, bias), problem.activation)

    return Candidate(op, layout, "reference", "unpacks on every call, then torch's linear", always, run)


def plain(op: str, layout: str) -> Candidate:
    """The reference of a layout whose first tensor is the dense weight."""
    return Candidate(op, layout, "reference", "torch's linear on the unpacked weight", always, _dense)


def _dense(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    return activate(F.linear(x, weight[0], bias), problem.activation)
