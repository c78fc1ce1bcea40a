"""How an n:m weight can be held on a device: for each layout its tensors and the way from and to the neutral format.

Exactly one layout is held at a time. ``neutral`` is what lies on disk; ``dense`` trades memory for torch's dense
matmul; the others belong to a kernel. Every layout gives the neutral tensors back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsebert.formats import nm


class Spec(NamedTuple):
    """Pattern and sizes of one weight ``(out_features, in_features)`` at n:m."""

    n: int
    m: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Layout:
    """One layout.

    ``tensors`` names what it holds, in the order the op takes it. ``supports(spec, dtype, device)`` gives None or why a
    device cannot hold it. ``castable``: its float tensors may be cast to another float dtype. ``from_dense`` is None
    for ``neutral``, which is its own source.
    """

    name: str
    tensors: tuple[str, ...]
    castable: bool
    supports: Callable[[Spec, torch.dtype, torch.device], str | None]
    check: Callable[[list[Tensor], Spec], None]
    from_dense: Callable[[Tensor, Spec], list[Tensor]]
    to_dense: Callable[[list[Tensor], Spec], Tensor]


def check_tensor(tensor: Tensor, name: str, shape: tuple[int, ...], spec: Spec) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"nm_linear: weight_{name} has shape {tuple(tensor.shape)}, expected {shape} for "
            f"in_features={spec.in_features} at {spec.n}:{spec.m}"
        )


def check_count(weight: list[Tensor], names: tuple[str, ...], layout: str) -> None:
    if len(weight) != len(names):
        raise ValueError(
            f"nm_linear: weight has {len(weight)} tensors, expected {len(names)} ({', '.join(names)}) "
            f"for layout {layout!r}"
        )


def _check_neutral(weight: list[Tensor], spec: Spec) -> None:
    check_count(weight, ("values", "positions"), "neutral")
    values_shape, positions_shape = nm.packed_shapes(spec.n, spec.m, spec.out_features, spec.in_features)
    check_tensor(weight[0], "values", values_shape, spec)
    check_tensor(weight[1], "positions", positions_shape, spec)
    if weight[1].dtype != torch.uint8:
        raise TypeError(f"nm_linear: weight_positions is {weight[1].dtype}, expected torch.uint8")


def _check_dense(weight: list[Tensor], spec: Spec) -> None:
    check_count(weight, ("dense",), "dense")
    check_tensor(weight[0], "dense", (spec.out_features, spec.in_features), spec)


_layouts: dict[str, Layout] = {}


def add(layout: Layout) -> None:
    _layouts[layout.name] = layout


def get(name: str) -> Layout:
    try:
        return _layouts[name]
    except KeyError:
        raise ValueError(f"nm_linear: layout is {name!r}, expected one of {', '.join(_layouts)}") from None


def names() -> tuple[str, ...]:
    return tuple(_layouts)


add(
    Layout(
        "neutral",
        tensors=("values", "positions"),
        castable=True,
        supports=lambda spec, dtype, device: None,
        check=_check_neutral,
        from_dense=lambda dense, spec: list(nm.pack(dense, spec.n, spec.m)),
        to_dense=lambda weight, spec: nm.unpack(weight[0], weight[1], spec.n, spec.m, spec.in_features),
    )
)
add(
    Layout(
        "dense",
        tensors=("dense",),
        castable=True,
        supports=lambda spec, dtype, device: None,
        check=_check_dense,
        from_dense=lambda dense, spec: [dense],
        to_dense=lambda weight, spec: weight[0].clone(),
    )
)
