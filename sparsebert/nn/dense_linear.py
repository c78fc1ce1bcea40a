"""``DenseLinear``: a dense linear layer of which only some rows may be left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.configs import DenseConfig
from sparsebert.formats.common import DTYPES, check_tensor, refuse_non_finite
from sparsebert.nn.packed_linear import PackedLinear
from sparsebert.ops.layouts import DENSE, NEUTRAL
from sparsebert.ops.specs import DenseSpec


class DenseLinear(PackedLinear):
    """y = x Wᵀ + b: the buffer ``values (out, in)`` is W as it is, in the rows that are kept.

    Without ``kept_rows`` it is an ``nn.Linear`` whose weight does not train. ``compress_`` makes one of an
    ``intermediate`` layer that is left dense where the layer after it drops input columns.
    """

    format = DenseConfig.format
    plain_layouts = (NEUTRAL, DENSE)
    fuses_activations = True
    spec: DenseSpec

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = DenseSpec(in_features, out_features)
        super().__init__(spec, bias=bias, activation=activation, device=device, dtype=dtype)

    @classmethod
    def _pack(
        cls, weight: Tensor, config: DenseConfig, name: str, factors: Mapping[str, Tensor]
    ) -> tuple[DenseSpec, Sequence[Tensor]]:
        refuse_non_finite(weight, f"{name}: weight")
        out_features, in_features = weight.shape
        # A copy: a state dict that is loaded into the module must not write into the dense layer.
        return DenseSpec(in_features, out_features), (weight.clone(),)

    @classmethod
    def _spec_from_entry(cls, entry: Mapping[str, Any], in_features: int, out_features: int, name: str) -> DenseSpec:
        return DenseSpec(in_features, out_features)

    def _entry(self) -> dict[str, Any]:
        return {}

    def _validate(self, tensors: Sequence[Tensor], name: str) -> None:
        (values,) = tensors
        check_tensor(values, (self.spec.out_features, self.spec.in_features), DTYPES, f"{name}: values")
        if not values.is_meta:
            refuse_non_finite(values, f"{name}: values")

    def _recast(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[DenseSpec, Sequence[Tensor]]:
        values = tensors[0].to(dtype)
        refuse_non_finite(values, "cast: values")
        return self.spec, (values,)
