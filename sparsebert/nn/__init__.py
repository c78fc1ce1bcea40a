"""Drop-in modules for ``nn.Linear`` with packed weights."""

from __future__ import annotations

from typing import Any

import torch

from sparsebert.nn.bitmap_linear import BitmapLinear
from sparsebert.nn.dense_linear import DenseLinear
from sparsebert.nn.int8_linear import Int8Linear, quantizing
from sparsebert.nn.low_rank_linear import LowRankLinear
from sparsebert.nn.low_rank_sparse_linear import LowRankSparseLinear
from sparsebert.nn.nm_linear import NMLinear
from sparsebert.nn.packed_linear import PackedLinear
from sparsebert.nn.stacking import split, stack, stack_refusal

__all__ = [
    "MODULES",
    "BitmapLinear",
    "DenseLinear",
    "Int8Linear",
    "LowRankLinear",
    "LowRankSparseLinear",
    "NMLinear",
    "PackedLinear",
    "module_from_entry",
    "quantizing",
    "split",
    "stack",
    "stack_refusal",
]

# format name in a plan or a layer map -> the module that holds it
MODULES: dict[str, type[PackedLinear]] = {
    module.format: module
    for module in (NMLinear, BitmapLinear, LowRankLinear, LowRankSparseLinear, Int8Linear, DenseLinear)
}


def module_from_entry(
    entry: dict[str, Any],
    *,
    name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PackedLinear:
    """An unfilled module for one entry of a checkpoint's layer map, ready for its neutral tensors to be loaded.

    The entry is not trusted: ``ValueError`` naming the layer ``name`` where it does not describe a layer. ``dtype``
    overrides the stored one. Build on ``meta`` to allocate nothing.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: layer map entry is {type(entry).__name__}, expected a JSON object")
    kind = entry.get("format")
    if not isinstance(kind, str) or kind not in MODULES:
        raise ValueError(f"{name}: format is {kind!r}, expected one of {', '.join(MODULES)}")
    return MODULES[kind].from_entry(entry, name=name, device=device, dtype=dtype)
