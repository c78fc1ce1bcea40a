"""The activations an op can apply to its output, by the names its schema takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "gelu": F.gelu,  # x * Phi(x), by erf
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": torch.relu,
}


def activate(y: Tensor, activation: str) -> Tensor:
    """``activation(y)``, element-wise in the dtype of y; a new tensor unless it is ``none``."""
    return ACTIVATIONS[activation](y)
