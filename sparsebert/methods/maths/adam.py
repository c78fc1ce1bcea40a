"""Adam for what a run learns itself, beside the optimizer of the loop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adam_step_(
    values: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """Step number ``step``, from 1, of AdamW without weight decay on ``values``, in place, as ``torch.optim.AdamW``
    does it; all four tensors have one shape and dtype::

        mean   <- b1 mean + (1 - b1) g        square <- b2 square + (1 - b2) g²
        values <- values - lr (mean / (1 - b1^step)) / (sqrt(square / (1 - b2^step)) + eps)

    Kingma, Ba: Adam: A Method for Stochastic Optimization (ICLR 2015).
    """
    adamw(
        [values],
        [gradient],
        [mean],
        [square],
        [],
        # It counts up before it computes.
        [torch.full((), float(step - 1), device=values.device)],
        # One pass over memory instead of seven; these are the devices that surely have it.
        fused=values.device.type in ("cpu", "cuda"),
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )
