"""``sparsebert::low_rank_sparse_linear``: y = activation((x vᵀ) uᵀ + x Sᵀ + b), a low-rank and a sparse part.

S has whole rows (``rows``), an n:m pattern (``nm``) or any places (``bitmap``). See ``ops.linear`` for the contract.

Layouts besides ``neutral``: ``stacked`` (rows only) holds v and the rows of S as one matrix ``(parts * rank + count,
in)``, so that x is read once: [t; s] = x [v; S']ᵀ, y = t uᵀ, y[:, rows] += s. ``dense`` holds the unpacked weight
beside the neutral tensors, which cannot be told from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.formats import bitmap, low_rank, nm, rows
from sparsebert.ops import layouts, reference, select
from sparsebert.ops.activations import activate
from sparsebert.ops.layouts import COMPUTE, Held, Layout
from sparsebert.ops.low_rank import factors
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import LowRankSparseSpec

OP = "low_rank_sparse_linear"
STACKED = "stacked"


def low_rank_sparse_linear(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, *, layout: str, **sizes: Any
) -> Tensor:
    """y = activation((x vᵀ) uᵀ + x Sᵀ + b); keywords ``rank, sparse, n, m, count, in_features, out_features,
    parts=1, activation`` (see ``ops.specs.LowRankSparseSpec``).

    ``weight`` in layout ``neutral``: ``u (out, rank)``, ``v (parts * rank, in)`` and the tensors of S: ``rows`` and
    ``values``, ``values`` and ``positions``, or ``values``, ``bitmap`` and ``row_offsets``. Errors as those of
    ``nm_linear``.
    """
    return torch.ops.sparsebert.low_rank_sparse_linear(x, weight, bias, layout=layout, **sizes)


def sparse_tensors(spec: LowRankSparseSpec) -> dict[str, Held]:
    """The tensors of S."""
    out, columns = spec.out_features, spec.in_features
    if spec.sparse == "rows":
        return {"rows": Held((spec.count,), torch.int32), "values": Held((spec.count, columns), COMPUTE)}
    if spec.sparse == "nm":
        values, positions = nm.packed_shapes(spec.n, spec.m, out, columns)
        return {"values": Held(values, COMPUTE), "positions": Held(positions, torch.uint8)}
    if spec.sparse != "bitmap":
        raise ValueError(f"{OP}: sparse is {spec.sparse!r}, expected one of rows, nm, bitmap")
    values_shape, bits, offsets = bitmap.packed_shapes(out, columns, spec.count)
    return {
        "values": Held(values_shape, COMPUTE),
        "bitmap": Held(bits, torch.uint8),
        "row_offsets": Held(offsets, torch.int64),
    }


def unpack_sparse(sparse: list[Tensor], spec: LowRankSparseSpec) -> Tensor:
    """S ``(out, in)`` from its tensors."""
    if spec.sparse == "rows":
        return rows.unpack(sparse[0], sparse[1], spec.out_features)
    if spec.sparse == "nm":
        return nm.unpack(sparse[0], sparse[1], spec.n, spec.m, spec.in_features)
    return bitmap.unpack(sparse[0], sparse[1], sparse[2], spec.in_features)


def pack_sparse(dense: Tensor, spec: LowRankSparseSpec, *, name: str = "weight") -> list[Tensor]:
    """Inverse of ``unpack_sparse``; ``ValueError`` naming ``name`` where S does not obey its pattern."""
    if spec.sparse == "rows":
        return list(rows.pack(dense, spec.count, name=name))
    if spec.sparse == "nm":
        return list(nm.pack(dense, spec.n, spec.m, name=name))
    return list(bitmap.pack(dense, name=name, nnz=spec.count))


def stack_sparse(parts: Sequence[Sequence[Tensor]], spec: LowRankSparseSpec) -> list[Tensor]:
    """The tensors of S of those of ``spec.parts`` of one size, one under the other."""
    if spec.sparse == "rows":
        return list(rows.stack([(part[0], part[1]) for part in parts], _sizes(spec)))
    if spec.sparse == "nm":
        return [torch.cat(one) for one in zip(*parts, strict=True)]
    return list(bitmap.stack([(part[0], part[1], part[2]) for part in parts]))


def split_sparse(sparse: Sequence[Tensor], spec: LowRankSparseSpec) -> list[tuple[Tensor, ...]]:
    """Inverse of ``stack_sparse``: new tensors, as many rows or non-zeros each as its part had."""
    if spec.sparse == "rows":
        return [*rows.split(sparse[0], sparse[1], _sizes(spec))]
    if spec.sparse == "nm":
        return [*zip(*([part.clone() for part in tensor.chunk(spec.parts)] for tensor in sparse), strict=True)]
    return [*bitmap.split(sparse[0], sparse[1], sparse[2], _sizes(spec))]


def _sizes(spec: LowRankSparseSpec) -> list[int]:
    """The features of each part."""
    return [spec.out_features // spec.parts] * spec.parts


def tensors(spec: LowRankSparseSpec) -> dict[str, Held]:
    return {
        **factors(spec, spec.rank),
        **{f"sparse.{name}": held for name, held in sparse_tensors(spec).items()},
    }


def unpack(weight: list[Tensor], spec: LowRankSparseSpec, dtype: torch.dtype | None = None) -> Tensor:
    """u v + S in their own dtype, rounded once."""
    u, v, *sparse = weight
    if u.dtype in (torch.float16, torch.bfloat16):
        return low_rank.unpack(u.float(), v.float(), spec.parts).add_(unpack_sparse(sparse, spec)).to(u.dtype)
    return low_rank.unpack(u, v, spec.parts).add_(unpack_sparse(sparse, spec))


def multiply(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    """torch's linear on each factor and on the unpacked sparse part."""
    u, v, *sparse = weight
    y = reference.through_u(F.linear(x, v), u, bias, problem.spec.parts)
    if problem.spec.sparse == "rows":
        y.index_add_(-1, sparse[0], F.linear(x, sparse[1]))
    else:
        y += F.linear(x, unpack_sparse(sparse, problem.spec))
    return activate(y, problem.activation)


def _stacked(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    stacked, u, places = weight
    spec: LowRankSparseSpec = problem.spec
    t, s = F.linear(x, stacked).split((_ranks(spec), spec.count), dim=-1)
    y = reference.through_u(t, u, bias, spec.parts)
    return activate(y.index_add_(-1, places, s), problem.activation)


def _ranks(spec: LowRankSparseSpec) -> int:
    """The rows of v."""
    return spec.parts * spec.rank


def _stacked_tensors(spec: LowRankSparseSpec) -> dict[str, Held]:
    return {
        "stacked": Held((_ranks(spec) + spec.count, spec.in_features), COMPUTE),
        "u": factors(spec, spec.rank)["u"],
        "rows": Held((spec.count,), torch.int32),
    }


def _stack(weight: list[Tensor], spec: LowRankSparseSpec, dtype: torch.dtype) -> list[Tensor]:
    u, v, places, values = weight
    return [torch.cat((v, values)), u, places]


def _unstack(weight: list[Tensor], spec: LowRankSparseSpec) -> list[Tensor]:
    stacked, u, places = weight
    # Copies: a slice would keep the whole stack alive.
    return [u, stacked[: _ranks(spec)].clone(), places, stacked[_ranks(spec) :].clone()]


layouts.add(layouts.neutral(OP, tensors, unpack))
layouts.add(layouts.dense_and_neutral(OP))
layouts.add(
    Layout(
        OP,
        STACKED,
        _stacked_tensors,
        lambda spec, dtype, device: (
            None if spec.sparse == "rows" else f"needs a sparse part of rows, not {spec.sparse}"
        ),
        from_neutral=_stack,
        to_neutral=_unstack,
        to_dense=lambda weight, spec, dtype: unpack(_unstack(weight, spec), spec),
    )
)

for _layout, _text, _run in (
    (layouts.NEUTRAL, "torch's linear on each factor and on the unpacked sparse part", multiply),
    (STACKED, "torch's linear on the stacked factors, rows added", _stacked),
):
    select.add_candidate(Candidate(OP, _layout, "reference", _text, reference.always, _run))
select.add_candidate(reference.unpacked(OP, layouts.DENSE))
