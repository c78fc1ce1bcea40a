"""How a weight can be held on a device: for each op its layouts, their tensors, and the way from and to the neutral
format.

Exactly one layout is held at a time. ``neutral`` is what lies on disk; ``dense`` trades memory for torch's dense
matmul; the others belong to a kernel. Every layout gives the neutral tensors back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsebert.ops.specs import Spec

NEUTRAL, DENSE = "neutral", "dense"
# What the dtype of a tensor can be besides a dtype of torch: that of x, or any float one.
COMPUTE, FLOAT = "compute", "float"


class Held(NamedTuple):
    """One tensor of a layout: its shape (None where only its kernel knows) and dtype (``COMPUTE``, ``FLOAT`` or one of
    torch)."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | str


@dataclass(frozen=True)
class Layout:
    """One layout of the weights of one op; a weight is the list of its tensors, in the order of ``tensors(spec)``.

    ``supports(spec, dtype, device)`` gives None or why a device cannot hold it; ``dtype`` is that of x. ``castable``:
    its COMPUTE tensors may be cast to another float dtype. ``to_dense(weight, spec, dtype)`` is the dense weight
    ``(out_features, in_features)``, a new tensor, in ``dtype`` where the layout has no dtype of its own.
    """

    op: str
    name: str
    tensors: Callable[[Any], Mapping[str, Held]]
    supports: Callable[[Any, torch.dtype, torch.device], str | None]
    from_neutral: Callable[[list[Tensor], Any, torch.dtype], list[Tensor]]
    to_neutral: Callable[[list[Tensor], Any], list[Tensor]]
    to_dense: Callable[[list[Tensor], Any, torch.dtype], Tensor]
    castable: bool = True


_layouts: dict[tuple[str, str], Layout] = {}


def add(layout: Layout) -> None:
    _layouts[layout.op, layout.name] = layout
    tensors.cache_clear()


def get(op: str, name: str) -> Layout:
    try:
        return _layouts[op, name]
    except KeyError:
        raise ValueError(f"{op}: layout is {name!r}, expected one of {', '.join(names(op))}") from None


def names(op: str) -> tuple[str, ...]:
    """The layouts of an op, ``neutral`` and ``dense`` first."""
    return tuple(name for known, name in _layouts if known == op)


# Typed: specs of two ops are equal where their numbers are, as tuples.
@lru_cache(maxsize=4096, typed=True)
def tensors(spec: Spec, name: str) -> dict[str, Held]:
    """What the layout ``name`` of a weight consists of."""
    return dict(get(spec.op, name).tensors(spec))


def anywhere(spec: Spec, dtype: torch.dtype, device: torch.device) -> None:
    """``supports`` of a layout that every device can hold."""
    return None


def neutral(
    op: str,
    held: Callable[[Any], Mapping[str, Held]],
    to_dense: Callable[[list[Tensor], Any, torch.dtype], Tensor],
) -> Layout:
    """The layout that is its own neutral form."""
    return Layout(
        op,
        NEUTRAL,
        held,
        anywhere,
        from_neutral=lambda weight, spec, dtype: list(weight),
        to_neutral=lambda weight, spec: list(weight),
        to_dense=to_dense,
    )


def dense(op: str, from_dense: Callable[[Tensor, Any], list[Tensor]]) -> Layout:
    """The unpacked weight, for a format whose neutral tensors follow from it by ``from_dense``."""
    return Layout(
        op,
        DENSE,
        lambda spec: {"dense": Held((spec.out_features, spec.in_features), COMPUTE)},
        anywhere,
        from_neutral=lambda weight, spec, dtype: [get(op, NEUTRAL).to_dense(weight, spec, dtype)],
        to_neutral=lambda weight, spec: from_dense(weight[0], spec),
        to_dense=lambda weight, spec, dtype: weight[0].clone(),
    )


def dense_and_neutral(op: str) -> Layout:
    """The unpacked weight beside the neutral tensors, for a format that cannot be told from its unpacked weight."""
    return Layout(
        op,
        DENSE,
        lambda spec: {"dense": Held((spec.out_features, spec.in_features), COMPUTE), **tensors(spec, NEUTRAL)},
        anywhere,
        from_neutral=lambda weight, spec, dtype: [get(op, NEUTRAL).to_dense(weight, spec, dtype), *weight],
        to_neutral=lambda weight, spec: weight[1:],
        to_dense=lambda weight, spec, dtype: weight[0].clone(),
    )
