"""Layers whose weight is trained as factors: W = u v, or W = u v + S, through ``torch.nn.utils.parametrize``.

The layer stays where it is, and its ``weight`` is computed from its parameters ``u``, ``v`` and ``sparse`` in every
forward, so that y = x Wᵀ + b and the gradients are those of (x vᵀ) uᵀ + x Sᵀ + b.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Factors(nn.Module):
    """(u, v) -> u v, or (u, v, S) -> u v + S."""

    def __init__(self, factors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._first: tuple[Tensor, ...] | None = tuple(factors[name] for name in NAMES[: len(factors)])

    def forward(self, u: Tensor, v: Tensor, sparse: Tensor | None = None) -> Tensor:
        return u @ v if sparse is None else torch.addmm(sparse, u, v)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The factors that this was made with: a weight has many."""
        if self._first is None:
            raise RuntimeError("Factors: a weight that is made of factors cannot be assigned")
        first, self._first = self._first, None
        return first


NAMES = ("u", "v", "sparse")


def factor_(linear: nn.Linear, parametrization: Factors) -> None:
    """Trains ``linear.weight`` as the factors that ``parametrization`` was made with, in place."""
    trains = linear.weight.requires_grad
    parametrize.register_parametrization(linear, "weight", parametrization)
    for parameter in parameters_of(linear).values():
        parameter.requires_grad_(trains)


def parameters_of(linear: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of a layer that ``factor_`` made, by name."""
    held = linear.parametrizations.weight  # type: ignore[union-attr]
    return {
        name: getattr(held, f"original{i}")  # how parametrize calls them
        for i, name in enumerate(NAMES)
        if hasattr(held, f"original{i}")
    }


def unfactor_(linear: nn.Module) -> dict[str, Tensor]:
    """Makes the layer an ``nn.Linear`` with the product as its weight again, in place; returns the factors."""
    held = parameters_of(linear)
    factors = {name: parameter.detach().clone() for name, parameter in held.items()}
    trains = held["u"].requires_grad
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    # Of factors that do not train, or without gradient tracking, parametrize leaves a buffer.
    weight = linear.weight.detach()  # type: ignore[union-attr, operator]
    del linear.weight
    linear.weight = nn.Parameter(weight, requires_grad=trains)
    return factors
