"""``NMLinear``: a linear layer whose n:m weight is held packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.configs import NMConfig
from sparsebert.formats import nm
from sparsebert.nn.packed_linear import PackedLinear, read_int
from sparsebert.ops.specs import NMSpec


class NMLinear(PackedLinear):
    """y = x Wᵀ + b with W ``(out_features, in_features)`` at n:m: buffers ``values`` and ``positions`` of
    ``sparsebert.formats.nm``.

    On a CPU the layout ``auto`` is ``dense``: the weight is unpacked once and held so, which costs the memory of a
    dense layer (``memory_bytes`` says so) and the time of one. ``prepare_("neutral")`` holds the packed tensors and
    unpacks in every call instead.
    """

    format = NMConfig.format
    spec: NMSpec

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        m: int,
        *,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        NMConfig(n, m)
        spec = NMSpec(n, m, in_features, out_features)
        super().__init__(spec, bias=bias, activation=activation, device=device, dtype=dtype)

    @classmethod
    def _pack(
        cls, weight: Tensor, config: NMConfig, name: str, factors: Mapping[str, Tensor]
    ) -> tuple[NMSpec, Sequence[Tensor]]:
        out_features, in_features = weight.shape
        return NMSpec(config.n, config.m, in_features, out_features), nm.pack(weight, config.n, config.m, name=name)

    @classmethod
    def _spec_from_entry(cls, entry: Mapping[str, Any], in_features: int, out_features: int, name: str) -> NMSpec:
        n, m = (read_int(entry, key, name, -(1 << 31), 1 << 31) for key in ("n", "m"))
        NMConfig(n, m)
        return NMSpec(n, m, in_features, out_features)

    def _entry(self) -> dict[str, Any]:
        return {"n": self.spec.n, "m": self.spec.m}

    def _validate(self, tensors: Sequence[Tensor], name: str) -> None:
        spec = self.spec
        nm.validate(tensors[0], tensors[1], spec.n, spec.m, spec.out_features, spec.in_features, name=name)

    def _recast(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[NMSpec, Sequence[Tensor]]:
        # Another dtype may round weights to zero, which moves slots: so it goes through the dense weight.
        dense = nm.unpack(tensors[0], tensors[1], self.spec.n, self.spec.m, self.spec.in_features)
        return self.spec, nm.pack(dense.to(dtype), self.spec.n, self.spec.m, name="cast")
