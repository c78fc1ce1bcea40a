"""``LowRankLinear``: a linear layer held as two factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.configs import LowRankConfig
from sparsebert.formats import low_rank
from sparsebert.nn.packed_linear import PackedLinear, read_int
from sparsebert.ops.specs import LowRankSpec


class LowRankLinear(PackedLinear):
    """y = (x vᵀ) uᵀ + b: buffers ``u (out, rank)`` and ``v (rank, in)`` of ``sparsebert.formats.low_rank``.

    The factors are used as factors on every device, so fewer parameters are fewer operations. A stack of such layers
    (``nn.stack``) has the factors of each.
    """

    format = LowRankConfig.format
    may_differ = ()
    spec: LowRankSpec

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = LowRankSpec(rank, in_features, out_features)
        super().__init__(spec, bias=bias, activation=activation, device=device, dtype=dtype)

    @classmethod
    def _pack(
        cls, weight: Tensor, config: LowRankConfig, name: str, factors: Mapping[str, Tensor]
    ) -> tuple[LowRankSpec, Sequence[Tensor]]:
        u, v = factors_of(factors, weight, name)
        out_features, in_features = weight.shape
        return LowRankSpec(u.shape[1], in_features, out_features), (u, v)

    @classmethod
    def _spec_from_entry(cls, entry: Mapping[str, Any], in_features: int, out_features: int, name: str) -> LowRankSpec:
        rank = read_int(entry, "rank", name, 1, min(in_features, out_features))
        return LowRankSpec(rank, in_features, out_features)

    def _entry(self) -> dict[str, Any]:
        return {"rank": self.spec.rank}

    def _validate(self, tensors: Sequence[Tensor], name: str) -> None:
        spec = self.spec
        sizes = (spec.rank, spec.out_features, spec.in_features)
        low_rank.validate(tensors[0], tensors[1], *sizes, parts=spec.parts, name=name)

    def _recast(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[LowRankSpec, Sequence[Tensor]]:
        return self.spec, recast_factors(tensors, dtype)

    @classmethod
    def _stack_refusal(cls, parts: Sequence[PackedLinear]) -> str | None:
        return refuse_stacks(parts)

    @classmethod
    def _stack(cls, specs: Sequence[Any], tensors: Sequence[Sequence[Tensor]]) -> tuple[Any, Sequence[Tensor]]:
        # Rows of v as of u: each part's own ranks.
        spec, factors = super()._stack(specs, tensors)
        return spec._replace(parts=len(specs)), factors

    @classmethod
    def _split(cls, spec: Any, tensors: Sequence[Tensor], counts: list[int]) -> list[tuple[Any, Sequence[Tensor]]]:
        factors = split_factors(spec, tensors, counts)
        return [(spec._replace(out_features=len(u), parts=1), (u, v)) for u, v in factors]


def factors_of(factors: Mapping[str, Tensor], weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """``u`` and ``v`` in the weight's dtype; ``ValueError`` naming ``name`` where they are missing or do not fit."""
    missing = [key for key in ("u", "v") if key not in factors]
    if missing:
        raise ValueError(f"{name}: factor {missing[0]} is missing, a low-rank layer is made of its factors u and v")
    # Copies: a state dict that is loaded into the module must not write into the plan.
    u, v = (
        factors[key].detach().to(weight.dtype, copy=True, memory_format=torch.contiguous_format) for key in ("u", "v")
    )
    out_features, in_features = weight.shape
    low_rank.validate(u, v, u.shape[-1], out_features, in_features, name=name)
    return u, v


def recast_factors(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Factors in another dtype; ``ValueError`` where it cannot hold one of their numbers."""
    recast = [tensor.to(dtype) for tensor in tensors]
    for label, tensor in zip(("u", "v"), recast, strict=True):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"cast: {label} holds numbers beyond the range of {str(dtype).removeprefix('torch.')}")
    return recast


def refuse_stacks(parts: Sequence[PackedLinear]) -> str | None:
    """None, or which of ``parts`` is a stack of factors itself."""
    for place, part in enumerate(parts):
        if (held := part.spec.parts) > 1:  # type: ignore[union-attr]
            return f"part {place} is a stack of {held} already, expected single layers"
    return None


def split_factors(spec: Any, tensors: Sequence[Tensor], counts: list[int]) -> list[tuple[Tensor, Tensor]]:
    """u and v of each part, new tensors; ``ValueError`` unless the parts are what ``counts`` asks for."""
    own = [spec.out_features // spec.parts] * spec.parts
    if counts != own:
        raise ValueError(f"split: counts are {counts}, expected {own}, as a weight of {spec.label} is made of these")
    u, v = (tensor.chunk(spec.parts) for tensor in tensors)
    return [(part.clone(), ranks.clone()) for part, ranks in zip(u, v, strict=True)]
