"""Triton's candidates for low rank, alone and with a sparse part, and the layout ``grouped`` of a sparse part of whole
rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.ops import layouts, low_rank, low_rank_sparse, reference, select
from sparsebert.ops.activations import activate
from sparsebert.ops.devices import describe
from sparsebert.ops.layouts import COMPUTE, NEUTRAL, Held, Layout
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import LowRankSparseSpec
from sparsebert.ops.triton.configurations import columns
from sparsebert.ops.triton.support import refusal, rows_of

if TYPE_CHECKING:
    from sparsebert.kernels.low_rank_sparse_linear import Config

# Of a low-rank weight plus whole rows: the rows and the features without one, each in a block of its own.
GROUPED = "grouped"


@lru_cache(maxsize=1024)
def configurations(problem: Problem) -> Sequence[Config]:
    from sparsebert.kernels.low_rank_sparse_linear import Config

    itemsize = problem.dtype.itemsize
    # Wider tiles spill where the tensor cores take both operands from registers (all but sm_90 and sm_100).
    block_n = columns(problem.tokens, 128 // itemsize)
    block_m = 64 if block_n < 64 or itemsize == 4 else 128
    block_k = 128 // itemsize
    return [Config(block_m, block_n, block_k, block_k // 2, num_warps=8)]


def _run(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, *, configuration: Config) -> Tensor:
    from sparsebert.kernels.low_rank_sparse_linear import low_rank_sparse_linear

    spec: Any = problem.spec
    rows = rows_of(x)
    u, v, *parts = weight
    names = [name.removeprefix("sparse.") for name in layouts.tensors(spec, problem.layout)][2:]
    pattern = {"n": spec.n, "m": spec.m} if spec.op == low_rank_sparse.OP else {}
    y = low_rank_sparse_linear(
        rows,
        F.linear(rows, v),
        u,
        dict(zip(names, parts, strict=True)),
        bias,
        **pattern,
        activation=problem.activation,
        config=configuration,
    )
    return y.view(*x.shape[:-1], spec.out_features)


# The layout of whole rows


def _grouped_tensors(spec: LowRankSparseSpec) -> dict[str, Held]:
    return {
        "u": Held((spec.out_features, spec.rank), COMPUTE),
        "v": Held((spec.rank, spec.in_features), COMPUTE),
        "order": Held((spec.out_features,), torch.int32),
        "values": Held((spec.count, spec.in_features), COMPUTE),
    }


def _grouped_refusal(spec: LowRankSparseSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    if spec.sparse != "rows":
        return f"needs a sparse part of rows, not {spec.sparse}"
    return refusal(Problem(GROUPED, describe(device), dtype, spec, 1, "none"))


def _group(weight: list[Tensor], spec: LowRankSparseSpec, dtype: torch.dtype) -> list[Tensor]:
    u, v, places, values = weight
    others = torch.ones(spec.out_features, dtype=torch.bool, device=places.device)
    others[places.long()] = False
    return [u, v, torch.cat((places, others.nonzero().flatten().to(torch.int32))), values]


def _ungroup(weight: list[Tensor], spec: LowRankSparseSpec) -> list[Tensor]:
    u, v, order, values = weight
    # A copy: a slice would keep the whole order alive.
    return [u, v, order[: spec.count].clone(), values]


def _grouped(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    u, v, order, values = weight
    y = F.linear(F.linear(x, v), u, bias)
    return activate(y.index_add_(-1, order[: problem.spec.count], F.linear(x, values)), problem.activation)


layouts.add(
    Layout(
        low_rank_sparse.OP,
        GROUPED,
        _grouped_tensors,
        _grouped_refusal,
        from_neutral=_group,
        to_neutral=_ungroup,
        to_dense=lambda weight, spec, dtype: low_rank_sparse.unpack(_ungroup(weight, spec), spec),
    )
)
select.add_candidate(
    Candidate(
        low_rank_sparse.OP,
        GROUPED,
        "reference",
        "torch's linear on each factor and on the rows, rows added",
        reference.always,
        _grouped,
    )
)


def _refusal(problem: Problem) -> str | None:
    if problem.layout == NEUTRAL and getattr(problem.spec, "sparse", None) == "rows":
        return f"needs the layout {GROUPED!r}"
    return refusal(problem)


_TEXT = "Triton: sparse part and factors into one sum, one launch after x vᵀ"
for _op, _layout in ((low_rank.OP, NEUTRAL), (low_rank_sparse.OP, NEUTRAL), (low_rank_sparse.OP, GROUPED)):
    select.add_candidate(Candidate(_op, _layout, "triton", _TEXT, _refusal, _run, configurations))
