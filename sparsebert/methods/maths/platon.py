"""PLATON's score: sensitivity |W * G|, smoothed twice, and perhaps how sure it is.

Zhang et al.: PLATON: Pruning Large Transformer Models with Upper Confidence Bound of Weight Importance (ICML 2022). All
tensors have one shape: that of a weight, or one number a row where a row's mean is all that is wanted and ``beta2`` is
1. (Every step is linear in the sensitivity then, so the mean of a row may be taken first.)
"""

from __future__ import annotations

from torch import Tensor


def begins_window(step: int, window: int) -> bool:
    """Whether optimizer step ``step``, from 1, is the first of a window of ``window``: scores change only there."""
    return (step - 1) % window == 0


def update_(
    mean: Tensor,
    smoothed: Tensor,
    uncertainty: Tensor | None,
    sensitivity: Tensor,
    *,
    step: int,
    window: int,
    beta1: float,
    beta2: float = 1.0,
) -> None:
    """One optimizer step, in place. I ``mean`` is the running mean of the sensitivity in the window; as a window
    begins, the I that the last one left goes into Ī ``smoothed`` and U ``uncertainty`` (None: none is kept)::

        Ī <- beta1 Ī + (1 - beta1) I
        U <- beta2 U + (1 - beta2) |I - Ī|        with the new Ī

    All three start as zeros, so that Ī is 0 until the second window begins; it is not corrected for that, as the
    published code does not, and the order of scores does not depend on it.
    """
    place = (step - 1) % window
    if place == 0:
        smoothed.lerp_(mean, 1 - beta1)
        if uncertainty is not None:
            uncertainty.lerp_((mean - smoothed).abs_(), 1 - beta2)
        mean.copy_(sensitivity)
    else:
        mean.lerp_(sensitivity.to(mean.dtype), 1 / (place + 1))


def score(smoothed: Tensor, uncertainty: Tensor | None) -> Tensor:
    """Ī U, or Ī where no uncertainty is kept (``beta2`` = 1)."""
    return smoothed if uncertainty is None else smoothed * uncertainty
