"""Query, key and value as one linear layer, so that their input is read once, and the three of them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sparsebert.nn import stacking
from sparsebert.nn.packed_linear import PackedLinear


def refusal(parts: Sequence[nn.Module]) -> str | None:
    """None, or why the layers cannot be one."""
    if all(isinstance(part, PackedLinear) for part in parts):
        return stacking.stack_refusal(parts)  # type: ignore[arg-type]
    if not all(type(part) is nn.Linear for part in parts):
        return f"they are {', '.join(type(part).__name__ for part in parts)}"
    linears: Sequence[nn.Linear] = parts  # type: ignore[assignment]
    for name, values in (
        ("in_features", {part.in_features for part in linears}),
        ("bias", {part.bias is not None for part in linears}),
        ("dtype", {part.weight.dtype for part in linears}),
        ("device", {part.weight.device for part in linears}),
    ):
        if len(values) > 1:
            return f"{name} differs: {', '.join(sorted(map(str, values)))}"
    return None


@torch.no_grad()
def merge(parts: Sequence[nn.Module]) -> nn.Module:
    """One layer, dense or packed as the parts are, whose outputs are theirs one after the other; ``ValueError`` with
    ``refusal`` where there is none."""
    if reason := refusal(parts):
        raise ValueError(f"query, key and value cannot be one layer: {reason}")
    if isinstance(parts[0], PackedLinear):
        return stacking.stack(parts)  # type: ignore[arg-type]
    linears: Sequence[nn.Linear] = parts  # type: ignore[assignment]
    trains = linears[0].weight.requires_grad
    weight = torch.cat([part.weight for part in linears])
    bias = None if linears[0].bias is None else torch.cat([part.bias for part in linears])
    return _linear(weight, bias, trains).train(parts[0].training)


@torch.no_grad()
def split(merged: nn.Linear | PackedLinear, count: int = 3) -> list[nn.Module]:
    """``count`` layers of as many outputs each, with memory of their own."""
    if isinstance(merged, PackedLinear):
        return [*stacking.split(merged, count)]
    weights = merged.weight.chunk(count)
    biases = [None] * count if merged.bias is None else merged.bias.chunk(count)
    trains = merged.weight.requires_grad
    return [
        _linear(weight.clone(), None if bias is None else bias.clone(), trains).train(merged.training)
        for weight, bias in zip(weights, biases, strict=True)
    ]


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, trains: bool) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=trains)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=trains)
    return linear
