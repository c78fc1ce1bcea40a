"""``sparsebert::nm_linear``: y = activation(x Wᵀ + b) with an n:m weight; see ``ops.linear`` for the contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsebert.formats import nm
from sparsebert.ops import layouts, reference, select
from sparsebert.ops.layouts import COMPUTE, Held
from sparsebert.ops.specs import NMSpec

OP = "nm_linear"


def nm_linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, *, layout: str, **sizes: Any) -> Tensor:
    """y = activation(x Wᵀ + b) with W at n:m; keywords ``n, m, in_features, out_features, activation``.

    ``weight`` in layout ``neutral``: ``values`` and ``positions`` of ``formats.nm``. ``ValueError`` or ``TypeError``
    where a tensor does not fit; ``RuntimeError`` where no backend serves the call.
    """
    return torch.ops.sparsebert.nm_linear(x, weight, bias, layout=layout, **sizes)


def tensors(spec: NMSpec) -> dict[str, Held]:
    values, positions = nm.packed_shapes(spec.n, spec.m, spec.out_features, spec.in_features)
    return {"values": Held(values, COMPUTE), "positions": Held(positions, torch.uint8)}


def unpack(weight: list[Tensor], spec: NMSpec, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight of the neutral tensors, in their own dtype."""
    return nm.unpack(weight[0], weight[1], spec.n, spec.m, spec.in_features)


def pack(dense: Tensor, spec: NMSpec) -> list[Tensor]:
    return list(nm.pack(dense, spec.n, spec.m))


layouts.add(layouts.neutral(OP, tensors, unpack))
layouts.add(layouts.dense(OP, pack))

for _layout in (layouts.NEUTRAL, layouts.DENSE):
    select.add_candidate(reference.unpacked(OP, _layout))
