"""``StraightThrough``: the model computes with M * W while the optimizer trains the dense W behind it.

The forward's mask is in the parameter itself, so nothing is patched: between steps the parameter holds M * W, and what
the mask hides is kept apart. Around ``optimizer.step`` the dense weight comes back. The gradient that autograd leaves
is dL/d(M * W), at every entry: the straight-through estimate of dL/dW.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hide_(weight: Tensor, mask: Tensor, hidden: Tensor) -> None:
    """Dense ``weight`` -> M * W in place; ``hidden`` takes (1 - M) * W. Finite weights."""
    # W - W is +0.0 where W * 0 may be -0.0, and both passes are twice as fast as where and masked_fill on a CPU.
    torch.mul(weight, mask.logical_not(), out=hidden)
    weight.sub_(hidden)


def reveal_(weight: Tensor, hidden: Tensor) -> None:
    """M * W -> the dense ``weight`` in place, exactly: one of the two addends is zero everywhere."""
    weight.add_(hidden)
