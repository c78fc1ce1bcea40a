"""``BitmapLinear``: a linear layer whose unstructured sparse weight is held packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.configs import BitmapConfig
from sparsebert.formats import bitmap
from sparsebert.nn.packed_linear import PackedLinear, read_int
from sparsebert.ops.specs import BitmapSpec


class BitmapLinear(PackedLinear):
    """y = x Wᵀ + b with ``nnz`` non-zeros in W: buffers ``values``, ``bitmap`` and ``row_offsets`` of
    ``sparsebert.formats.bitmap``.

    There is no arithmetic for it yet: on a CPU ``auto`` is ``dense``, and ``neutral`` unpacks in every call.
    """

    format = BitmapConfig.format
    may_differ = ("nnz", "out_features")
    spec: BitmapSpec

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nnz: int,
        *,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = BitmapSpec(nnz, in_features, out_features)
        super().__init__(spec, bias=bias, activation=activation, device=device, dtype=dtype)

    @classmethod
    def _pack(
        cls, weight: Tensor, config: BitmapConfig, name: str, factors: Mapping[str, Tensor]
    ) -> tuple[BitmapSpec, Sequence[Tensor]]:
        out_features, in_features = weight.shape
        tensors = bitmap.pack(weight, name=name)
        return BitmapSpec(tensors[0].numel(), in_features, out_features), tensors

    @classmethod
    def _spec_from_entry(cls, entry: Mapping[str, Any], in_features: int, out_features: int, name: str) -> BitmapSpec:
        nnz = read_int(entry, "nnz", name, 0, in_features * out_features)
        return BitmapSpec(nnz, in_features, out_features)

    def _entry(self) -> dict[str, Any]:
        return {"nnz": self.spec.nnz}

    def _validate(self, tensors: Sequence[Tensor], name: str) -> None:
        spec, (values, bits, row_offsets) = self.spec, tensors
        bitmap.validate(values, bits, row_offsets, spec.nnz, spec.out_features, spec.in_features, name=name)

    @classmethod
    def _stack(cls, specs: Sequence[Any], tensors: Sequence[Any]) -> tuple[Any, Sequence[Tensor]]:
        out_features, nnz = (sum(getattr(spec, name) for spec in specs) for name in ("out_features", "nnz"))
        return specs[0]._replace(out_features=out_features, nnz=nnz), bitmap.stack(tensors)

    @classmethod
    def _split(cls, spec: Any, tensors: Sequence[Tensor], counts: list[int]) -> list[tuple[Any, Sequence[Tensor]]]:
        values, bits, row_offsets = tensors
        parts = bitmap.split(values, bits, row_offsets, counts)
        return [
            (spec._replace(out_features=count, nnz=len(part[0])), part)
            for count, part in zip(counts, parts, strict=True)
        ]

    def _recast(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[BitmapSpec, Sequence[Tensor]]:
        # Another dtype may round weights to zero, which are not stored: so it goes through the dense weight.
        values, bits, row_offsets = tensors
        dense = bitmap.unpack(values, bits, row_offsets, self.spec.in_features)
        recast = bitmap.pack(dense.to(dtype), name="cast")
        return self.spec._replace(nnz=recast[0].numel()), recast
