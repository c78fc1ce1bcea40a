"""``sparsebert::bitmap_linear``: y = activation(x Wᵀ + b) with an unstructured sparse weight; see ``ops.linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsebert.formats import bitmap
from sparsebert.ops import layouts, reference, select
from sparsebert.ops.layouts import COMPUTE, Held
from sparsebert.ops.specs import BitmapSpec

OP = "bitmap_linear"


def bitmap_linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, *, layout: str, **sizes: Any) -> Tensor:
    """y = activation(x Wᵀ + b) with a sparse W; keywords ``nnz, in_features, out_features, activation``.

    ``weight`` in layout ``neutral``: ``values``, ``bitmap`` and ``row_offsets`` of ``formats.bitmap``. Errors as those
    of ``nm_linear``.
    """
    return torch.ops.sparsebert.bitmap_linear(x, weight, bias, layout=layout, **sizes)


def tensors(spec: BitmapSpec) -> dict[str, Held]:
    values, bits, offsets = bitmap.packed_shapes(spec.out_features, spec.in_features, spec.nnz)
    return {
        "values": Held(values, COMPUTE),
        "bitmap": Held(bits, torch.uint8),
        "row_offsets": Held(offsets, torch.int64),
    }


def unpack(weight: list[Tensor], spec: BitmapSpec, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight of the neutral tensors, in their own dtype."""
    return bitmap.unpack(weight[0], weight[1], weight[2], spec.in_features)


def pack(dense: Tensor, spec: BitmapSpec) -> list[Tensor]:
    return list(bitmap.pack(dense, nnz=spec.nnz))


layouts.add(layouts.neutral(OP, tensors, unpack))
layouts.add(layouts.dense(OP, pack))

for _layout in (layouts.NEUTRAL, layouts.DENSE):
    select.add_candidate(reference.unpacked(OP, _layout))
