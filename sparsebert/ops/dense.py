"""``sparsebert::dense_linear``: y = activation(x Wᵀ + b) with a dense weight; see ``ops.linear`` for the contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import layouts, reference, select
from sparsebert.ops.layouts import COMPUTE, Held
from sparsebert.ops.specs import DenseSpec

OP = "dense_linear"


def dense_linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, *, layout: str, **sizes: Any) -> Tensor:
    """y = activation(x Wᵀ + b); keywords ``in_features, out_features, activation``.

    ``weight`` in layout ``neutral``: ``values (out, in)``. Errors as those of ``nm_linear``.
    """
    return torch.ops.sparsebert.dense_linear(x, weight, bias, layout=layout, **sizes)


def tensors(spec: DenseSpec) -> dict[str, Held]:
    return {"values": Held((spec.out_features, spec.in_features), COMPUTE)}


def unpack(weight: list[Tensor], spec: DenseSpec, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of the weight, in its own dtype."""
    return weight[0].clone()


layouts.add(layouts.neutral(OP, tensors, unpack))
layouts.add(layouts.dense(OP, lambda dense, spec: [dense]))

for _layout in (layouts.NEUTRAL, layouts.DENSE):
    select.add_candidate(reference.plain(OP, _layout))
