"""``LowRankSparseLinear``: a linear layer held as two factors and a sparse remainder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsebert.configs import BitmapConfig, LowRankSparseConfig, NMConfig, RowsConfig
from sparsebert.formats import bitmap, low_rank, nm, rows
from sparsebert.nn.low_rank_linear import factors_of, recast_factors, refuse_stacks, split_factors
from sparsebert.nn.packed_linear import PackedLinear, read_int
from sparsebert.ops import low_rank_sparse as op
from sparsebert.ops.specs import LowRankSparseSpec


class LowRankSparseLinear(PackedLinear):
    """y = (x vᵀ) uᵀ + x Sᵀ + b: buffers ``u``, ``v`` and, under ``sparse``, the tensors of S in its own format (rows,
    n:m or bitmap, see ``sparsebert.formats``)."""

    format = LowRankSparseConfig.format
    may_differ = ("count",)
    spec: LowRankSparseSpec

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        sparse: str,
        *,
        n: int = 1,
        m: int = 1,
        count: int = 0,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = LowRankSparseSpec(rank, sparse, n, m, count, in_features, out_features)
        super().__init__(spec, bias=bias, activation=activation, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: Any, config: LowRankSparseConfig, **options: Any) -> LowRankSparseLinear:
        rows_left, factors = options.get("kept_rows"), options.get("factors") or {}
        if rows_left is not None and isinstance(config.sparse, RowsConfig) and "sparse" in factors:
            # A ratio is one of all rows, and those it kept may all be among those that are left.
            used = int((factors["sparse"][rows_left.long()] != 0).any(1).sum())
            config = replace(config, sparse=RowsConfig(max(config.sparse.ratio, used / len(rows_left))))
        return super().from_linear(linear, config, **options)

    @classmethod
    def _pack(
        cls, weight: Tensor, config: LowRankSparseConfig, name: str, factors: Mapping[str, Tensor]
    ) -> tuple[LowRankSparseSpec, Sequence[Tensor]]:
        u, v = factors_of(factors, weight, name)
        if "sparse" not in factors:
            raise ValueError(f"{name}: factor sparse is missing, expected the sparse part {tuple(weight.shape)}")
        remainder = factors["sparse"].detach().to(weight.dtype)
        if remainder.shape != weight.shape:
            raise ValueError(
                f"{name}: factor sparse has shape {tuple(remainder.shape)}, expected {tuple(weight.shape)}"
            )
        out_features, in_features = weight.shape
        n = m = 1
        count = 0
        if isinstance(config.sparse, NMConfig):
            n, m = config.sparse.n, config.sparse.m
        elif isinstance(config.sparse, RowsConfig):
            count = rows.row_count(config.sparse.ratio, out_features)
        else:
            count = int((remainder != 0).sum())
        kind = config.sparse.format  # type: ignore[union-attr]
        spec = LowRankSparseSpec(u.shape[1], kind, n, m, count, in_features, out_features)
        return spec, (u, v, *op.pack_sparse(remainder, spec, name=name))

    @classmethod
    def _spec_from_entry(
        cls, entry: Mapping[str, Any], in_features: int, out_features: int, name: str
    ) -> LowRankSparseSpec:
        rank = read_int(entry, "rank", name, 1, min(in_features, out_features))
        kind = entry.get("sparse")
        n = m = 1
        count = 0
        if kind == NMConfig.format:
            n, m = (read_int(entry, key, name, -(1 << 31), 1 << 31) for key in ("n", "m"))
            NMConfig(n, m)
        elif kind == RowsConfig.format:
            count = read_int(entry, "rows", name, 0, out_features)
        elif kind == BitmapConfig.format:
            count = read_int(entry, "nnz", name, 0, in_features * out_features)
        else:
            raise ValueError(f"{name}: layer map gives sparse as {kind!r}, expected rows, nm or bitmap")
        return LowRankSparseSpec(rank, kind, n, m, count, in_features, out_features)

    def _entry(self) -> dict[str, Any]:
        spec = self.spec
        sizes = {"nm": {"n": spec.n, "m": spec.m}, "rows": {"rows": spec.count}, "bitmap": {"nnz": spec.count}}
        return {"rank": spec.rank, "sparse": spec.sparse, **sizes[spec.sparse]}

    def _validate(self, tensors: Sequence[Tensor], name: str) -> None:
        spec = self.spec
        sizes = (spec.out_features, spec.in_features)
        u, v, *sparse = tensors
        low_rank.validate(u, v, spec.rank, *sizes, parts=spec.parts, name=name)
        part = f"{name}: sparse"
        if spec.sparse == "rows":
            rows.validate(sparse[0], sparse[1], spec.count, *sizes, parts=spec.parts, name=part)
        elif spec.sparse == "nm":
            nm.validate(sparse[0], sparse[1], spec.n, spec.m, *sizes, name=part)
        else:
            bitmap.validate(sparse[0], sparse[1], sparse[2], spec.count, *sizes, name=part)

    def _recast(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[LowRankSparseSpec, Sequence[Tensor]]:
        spec = self.spec
        if spec.parts == 1:
            return _recast(spec, tensors, dtype)
        # Part by part: where a row rounds to zero, one of the same part fills up.
        parts = self._split(spec, tensors, [spec.out_features // spec.parts] * spec.parts)
        return self._stack(*zip(*(_recast(*part, dtype) for part in parts), strict=True))

    @classmethod
    def _stack_refusal(cls, parts: Sequence[PackedLinear]) -> str | None:
        return refuse_stacks(parts)

    @classmethod
    def _stack(cls, specs: Sequence[Any], tensors: Sequence[Sequence[Tensor]]) -> tuple[Any, Sequence[Tensor]]:
        out_features = [spec.out_features for spec in specs]
        spec = specs[0]._replace(
            count=sum(spec.count for spec in specs), out_features=sum(out_features), parts=len(specs)
        )
        u, v, *sparse = zip(*tensors, strict=True)
        return spec, (torch.cat(u), torch.cat(v), *op.stack_sparse(list(zip(*sparse, strict=True)), spec))

    @classmethod
    def _split(cls, spec: Any, tensors: Sequence[Tensor], counts: list[int]) -> list[tuple[Any, Sequence[Tensor]]]:
        u, v, *sparse = tensors
        factors = split_factors(spec, (u, v), counts)
        found: list[tuple[Any, Sequence[Tensor]]] = []
        for own, part in zip(factors, op.split_sparse(sparse, spec), strict=True):
            count = 0 if spec.sparse == "nm" else len(part[0])
            found.append((spec._replace(count=count, out_features=len(own[0]), parts=1), (*own, *part)))
        return found


def _recast(
    spec: LowRankSparseSpec, tensors: Sequence[Tensor], dtype: torch.dtype
) -> tuple[LowRankSparseSpec, Sequence[Tensor]]:
    u, v, *sparse = tensors
    remainder = op.unpack_sparse(sparse, spec).to(dtype)
    if spec.sparse == "bitmap":
        spec = spec._replace(count=int((remainder != 0).sum()))
    return spec, (*recast_factors((u, v), dtype), *op.pack_sparse(remainder, spec, name="cast"))
