"""How much a weight matters: formulas over weights and gradients of one layer. Larger is kept.

Moving averages are updated in place, in the tensors that a run keeps as its state.
"""

from __future__ import annotations

from torch import Tensor


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
