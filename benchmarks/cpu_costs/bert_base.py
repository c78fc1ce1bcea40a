"""The linear layers of BERT-base, with random weights."""

from __future__ import annotations

import torch
from torch import Tensor

LAYERS = 12
SHAPES = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]


def weights(layers: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The weights ``(out, in)`` of so many of its layers."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES * layers]


def megabytes(tensors: list[Tensor]) -> float:
    return sum(tensor.nbytes for tensor in tensors) / 1e6
