"""Layers whose weight is trained as factors: W = u v, or W = u v + S, through ``torch.nn.utils.parametrize``.

The layer stays where it is, and its ``weight`` is computed from its parameters ``u``, ``v`` and ``sparse`` in every
forward, so that y = x Wᵀ + b and the gradients are those of (x vᵀ) uᵀ + x Sᵀ + b.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsebert.configs import Config
from sparsebert.formats import low_rank
from sparsebert.formats.common import no_autocast
from sparsebert.methods.base import Run
from sparsebert.plan import CompressionPlan

NAMES = ("u", "v", "sparse")


class Factors(nn.Module):
    """(u, v) -> u v, or (u, v, S) -> u v + S."""

    def __init__(self, factors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._first: tuple[Tensor, ...] | None = tuple(factors[name] for name in NAMES[: len(factors)])

    def forward(self, u: Tensor, v: Tensor, sparse: Tensor | None = None) -> Tensor:
        # In the parameters' dtype: under autocast the layer rounds the sum once, as it would round a dense weight.
        with no_autocast(u.device):
            return u @ v if sparse is None else torch.addmm(sparse, u, v)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The factors that this was made with: a weight has many."""
        if self._first is None:
            raise RuntimeError("Factors: a weight that is made of factors cannot be assigned")
        first, self._first = self._first, None
        return first


def factor_(linear: nn.Linear, parametrization: Factors) -> None:
    """Trains ``linear.weight`` as the factors that ``parametrization`` was made with, in place."""
    trains = linear.weight.requires_grad
    parametrize.register_parametrization(linear, "weight", parametrization)
    # A new module is in training mode.
    linear.parametrizations.train(linear.training).requires_grad_(trains)  # type: ignore[union-attr]


def parameters_of(linear: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of a layer that ``factor_`` made, by name."""
    held = linear.parametrizations.weight  # type: ignore[union-attr]
    return {
        name: getattr(held, f"original{i}")  # how parametrize calls them
        for i, name in enumerate(NAMES)
        if hasattr(held, f"original{i}")
    }


@torch.no_grad()
def unfactor_(linear: nn.Module) -> dict[str, Tensor]:
    """Makes the layer an ``nn.Linear`` with the product as its weight again, in place; returns the factors."""
    held = parameters_of(linear)
    trains = any(parameter.requires_grad for parameter in held.values())
    factors = {name: parameter.detach().clone() for name, parameter in held.items()}
    # The weight is made as a plan's proof makes it, not as the forward does: rounded alike, so that factors that nearly
    # cancel pass too.
    weight = low_rank.unpack(factors["u"], factors["v"])
    if "sparse" in factors:
        weight += factors["sparse"]
    bias = linear.bias
    # Not remove_parametrizations: it edits the class, which a copy of this layer shares, and leaves a buffer where
    # gradients are not tracked.
    linear.__class__ = parametrize.type_before_parametrizations(linear)
    del linear.parametrizations, linear.bias
    # In the order of nn.Linear: the order of a model's parameters is that of an optimizer's state.
    linear.register_parameter("weight", nn.Parameter(weight, requires_grad=trains))
    linear.register_parameter("bias", bias)  # type: ignore[arg-type]
    return factors


class FactoredRun(Run):
    """A run whose layers are factored: the optimizer trains u, v and, where there is one, S in place of the weight.

    A subclass calls ``factor_all`` at the end of its ``__init__``, and says in ``final_config`` what a layer became.
    """

    def sparse(self, path: str) -> nn.Parameter | None:
        """The parameter S ``(out, in)`` of a layer that has one."""
        return self.factors(path).get("sparse")

    def factor_all(self, factors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Factors every layer in place. ``factors``: path -> u, v and perhaps sparse."""
        for path in self.configs:
            factor_(self.model.get_submodule(path), Factors(factors[path]))  # type: ignore[arg-type]

    def factors(self, path: str) -> dict[str, nn.Parameter]:
        """The parameters ``u (out, rank)``, ``v (rank, in)`` and, where there is one, ``sparse (out, in)``."""
        return parameters_of(self.model.get_submodule(path))

    def trained(self, path: str) -> list[nn.Parameter]:
        return list(self.factors(path).values())

    def stored(self, path: str) -> int:
        """How many numbers the layer's factors hold, S without its zeros."""
        return sum(int(p.count_nonzero()) if name == "sparse" else p.numel() for name, p in self.factors(path).items())

    def metrics(self) -> dict[str, float]:
        """``sparsity``: the part of the dense parameters that the factors save, 1 - stored / dense."""
        dense = 0
        for path in self.configs:
            parts = self.factors(path)
            dense += len(parts["u"]) * parts["v"].shape[1]
        return {"sparsity": 1 - sum(self.stored(path) for path in self.configs) / dense}

    def final_config(self, path: str, factors: Mapping[str, Tensor]) -> Config:
        """What the layer at ``path`` is in the plan."""
        return self.configs[path]

    @torch.no_grad()
    def finalize(self) -> CompressionPlan:
        self.detach()
        factors = {path: unfactor_(self.model.get_submodule(path)) for path in self.configs}
        plan = CompressionPlan({path: self.final_config(path, parts) for path, parts in factors.items()}, factors)
        plan.verify(self.model)
        return plan
