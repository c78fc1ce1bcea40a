"""Layers that are trained as factors: ``FactoredLinear``, which ``factor_`` makes of an ``nn.Linear`` in place and
``unfactor_`` makes one again, and the run that trains them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsebert.configs import Config
from sparsebert.formats import low_rank
from sparsebert.formats.common import no_autocast
from sparsebert.methods.base import Run
from sparsebert.plan import CompressionPlan

NAMES = ("u", "v", "sparse")


class FactoredLinear(nn.Linear):
    """y = (x vᵀ) uᵀ + b; with S, y = x (u v + S)ᵀ + b. Parameters ``u (out, rank)``, ``v (rank, in)`` and ``sparse
    (out, in)`` or None, in place of ``weight``.

    Each is the cheaper way: the rank is less than there are tokens, so that the sum of the weights costs less than a
    second product with each token, and without S no product of the size of the weight is needed at all. It is an
    ``nn.Linear`` made by ``factor_``, the same object as before, so that whoever holds it keeps it.
    """

    u: nn.Parameter
    v: nn.Parameter
    sparse: nn.Parameter | None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """u v, or u v + S, computed at each access."""
        # In the parameters' dtype: under autocast the layer rounds the sum once, as it would round a dense weight.
        with no_autocast(self.u.device):
            return self.u @ self.v if self.sparse is None else torch.addmm(self.sparse, self.u, self.v)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise RuntimeError("FactoredLinear: a weight that is made of factors cannot be assigned")

    def forward(self, input: Tensor) -> Tensor:
        if self.sparse is None:
            return F.linear(F.linear(input, self.v), self.u, self.bias)
        return F.linear(input, self.weight, self.bias)


def factor_(
    linear: nn.Linear, factors: Mapping[str, Tensor], kind: type[FactoredLinear] = FactoredLinear
) -> FactoredLinear:
    """Makes ``linear`` a ``kind`` with these factors, in place; they are trained where its weight was."""
    trains, bias = linear.weight.requires_grad, linear.bias
    del linear.weight, linear.bias
    linear.__class__ = kind
    for name in NAMES:
        part = nn.Parameter(factors[name], requires_grad=trains) if name in factors else None
        linear.register_parameter(name, part)
    linear.register_parameter("bias", bias)
    return linear  # type: ignore[return-value]


def parameters_of(linear: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of a layer that ``factor_`` made, by name."""
    return {name: part for name in NAMES if (part := getattr(linear, name)) is not None}


@torch.no_grad()
def unfactor_(linear: nn.Module) -> dict[str, Tensor]:
    """Makes the layer an ``nn.Linear`` with the product as its weight again, in place; returns the factors."""
    held = parameters_of(linear)
    trains = any(parameter.requires_grad for parameter in held.values())
    factors = {name: parameter.detach().clone() for name, parameter in held.items()}
    # The weight is made as a plan's proof makes it, not as the layer does: rounded alike, so that factors that nearly
    # cancel pass too.
    weight = low_rank.unpack(factors["u"], factors["v"])
    if "sparse" in factors:
        weight += factors["sparse"]
    bias = linear.bias
    for name in (*NAMES, "bias"):
        delattr(linear, name)
    linear.__class__ = nn.Linear
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
            factor_(self.model.get_submodule(path), factors[path])  # type: ignore[arg-type]

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
