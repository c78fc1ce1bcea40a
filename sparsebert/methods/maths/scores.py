"""How much a weight matters: formulas over weights and gradients of one layer. Larger is kept.

Moving averages are updated in place, in the tensors that a run keeps as its state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Elementwise rules of many operations go through a layer in blocks of so many entries on a CPU, so that what one of
# them wrote is in cache for the next: twice as fast on a matrix of 1536 x 384.
_BLOCK = 1 << 17


def magnitude(weight: Tensor) -> Tensor:
    """|W| (Han et al., NeurIPS 2015)."""
    return weight.abs()


def sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """|W * G|, the first-order change of the loss were the weight zero (Molchanov et al., ICLR 2017; SNIP: Lee et al.,
    ICLR 2019)."""
    return (weight * gradient).abs_()


def update_mean_(mean: Tensor, value: Tensor, count: int) -> None:
    """``mean`` of ``count`` values, the last of them ``value``, in place: mean += (value - mean) / count."""
    mean.lerp_(value, 1 / count)


def update_seven_(
    importance: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    gradient: Tensor,
    count: int,
    *,
    alpha1: float,
    alpha2: float,
    signed: bool = False,
) -> None:
    """One step of SEVEN's score, the ``count``-th (from 1), in place, with g = |G|, or G where ``signed``::

        m <- a1 m + (1 - a1) g              v <- a2 v + (1 - a2) g^2
        I <- I + |W * g * m' / v'|          m' = m / (1 - a1^count),  v' = sqrt(v / (1 - a2^count)) + 1e-9

    ``importance``, ``first`` and ``second`` are I, m and v, contiguous and of one dtype, zeros before the first step;
    ``weight`` and ``gradient`` are W and G, of the same shape.
    """
    correction = math.sqrt(1 - alpha2**count)
    # m' / v' = m / (sqrt(v) + 1e-9 c) * c / (1 - a1^count), with c = sqrt(1 - a2^count)
    factor, epsilon = correction / (1 - alpha1**count), 1e-9 * correction
    for i, m, v, w, g in _blocks((importance, first, second), weight, gradient):
        scratch = g.clone() if signed else g.abs()
        m.lerp_(scratch, 1 - alpha1)
        v.mul_(alpha2).addcmul_(g, g, value=1 - alpha2)
        product = scratch.mul_(w).mul_(m).abs_()
        i.addcdiv_(product, torch.sqrt(v).add_(epsilon), value=factor)


def update_platon_(
    smoothed: Tensor, uncertainty: Tensor | None, mean: Tensor, *, beta1: float, beta2: float = 1.0
) -> None:
    """What PLATON does at the end of a window, in place, with I the ``mean`` of |W * G| over it::

        S <- b1 S + (1 - b1) I          U <- b2 U + (1 - b2) |I - S|, with the new S

    ``smoothed`` is S and ``uncertainty`` is U, contiguous; without U (published: b2 = 1) S alone is the score.
    """
    if uncertainty is None:
        smoothed.lerp_(mean, 1 - beta1)
        return
    for s, u, i in _blocks((smoothed, uncertainty), mean):
        s.lerp_(i, 1 - beta1)
        u.lerp_((i - s).abs_(), 1 - beta2)


def _blocks(written: tuple[Tensor, ...], *read: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tuples of flat parts of tensors of one shape: views of those that are ``written``, and of the others their values
    in the dtype of the first."""
    first = written[0]
    size = _BLOCK if first.device.type == "cpu" else max(1, first.numel())
    # view, not flatten, so that a tensor of which only a copy could be flat is refused.
    flat = [tensor.view(-1) for tensor in written] + [tensor.flatten() for tensor in read]
    for parts in zip(*(tensor.split(size) for tensor in flat), strict=True):
        yield tuple(part.to(first.dtype) for part in parts)
