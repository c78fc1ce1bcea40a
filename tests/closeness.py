"""The rule for the error of a kernel: at most twice that of torch's op of the same dtype, both against float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.ops.activations import ACTIVATIONS


def check(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None, activation: str = "none") -> None:
    """At most twice the error of torch's op of the same dtype against float64."""
    act = ACTIVATIONS[activation]
    exact = act(F.linear(x.double(), dense.double(), None if bias is None else bias.double()))
    theirs = act(F.linear(x, dense, bias))
    assert y.shape == theirs.shape and y.dtype == theirs.dtype and y.is_contiguous()
    error = (theirs.double() - exact).abs().max() if exact.numel() else torch.zeros(())
    unit = torch.finfo(x.dtype).eps * exact.abs().max() if exact.numel() else 0
    assert not exact.numel() or (y.double() - exact).abs().max() <= 2 * error + unit
