"""The reference backend: unpack where needed, then torch's dense linear, on any device. Every other backend is held
to its numbers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparsebert.ops import layouts
from sparsebert.ops.activations import activate
from sparsebert.ops.select import Candidate, Problem


def _dense(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    return activate(F.linear(x, weight[0], bias), problem.activation)


def _neutral(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    spec = layouts.Spec(problem.n, problem.m, problem.in_features, problem.out_features)
    return _dense(x, [layouts.get("neutral").to_dense(weight, spec)], bias, problem)


def _always(problem: Problem) -> str | None:
    return None


CANDIDATES = (
    Candidate("nm_linear", "neutral", "reference", "unpacks on every call, then torch's linear", _always, _neutral),
    Candidate("nm_linear", "dense", "reference", "torch's linear on the unpacked weight", _always, _dense),
)
