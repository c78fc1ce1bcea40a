"""The layout ``mma_sp`` of three ops, and their candidates by the 2:4 kernel.

A 2:4 weight costs 9 bits a weight of 16 bits, 5 of int8 (``formats.mma_sp``); 1:4 and 1:2 are held as 2:4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.formats import mma_sp
from sparsebert.ops import int8, layouts, low_rank_sparse, nm, reference, select
from sparsebert.ops.cuda import calls, nm24
from sparsebert.ops.cuda.calls import rows_of
from sparsebert.ops.cuda.nm24 import Config, configurations
from sparsebert.ops.devices import describe
from sparsebert.ops.layouts import COMPUTE, NEUTRAL, Held, Layout
from sparsebert.ops.low_rank import RANK_MULTIPLE, padded_rank
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import Int8Spec, LowRankSparseSpec, NMSpec, Spec

MMA_SP = "mma_sp"
_TEXT = "CUDA: 2:4 on the sparse tensor cores by mma.sp"


def _holds(spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
    return nm24.refusal(spec, dtype, describe(device))


def _serves(problem: Problem) -> str | None:
    return nm24.refusal(problem.spec, problem.dtype, problem.device)


# nm_linear


def _held(spec: Any, itemsize: int, dtype: torch.dtype | str) -> dict[str, Held]:
    values, metadata = mma_sp.packed_shapes(spec.out_features, spec.in_features, itemsize)
    return {"values": Held(values, dtype), "metadata": Held(metadata, torch.int32)}


def _nm_from_neutral(weight: list[Tensor], spec: Any, dtype: torch.dtype) -> list[Tensor]:
    if weight[0].is_cuda:
        nm24.reserve_counters(weight[0].device)
    return list(mma_sp.pack(weight[0], weight[1], spec.n, spec.m, spec.in_features))


def _nm_to_neutral(weight: list[Tensor], spec: Any) -> list[Tensor]:
    return mma_sp.unpack(weight[0], weight[1], spec.n, spec.m, spec.out_features, spec.in_features)


layouts.add(
    Layout(
        nm.OP,
        MMA_SP,
        lambda spec: _held(spec, 2, COMPUTE),
        _holds,
        _nm_from_neutral,
        _nm_to_neutral,
        to_dense=lambda weight, spec, dtype: nm.unpack(_nm_to_neutral(weight, spec), spec),
        castable=False,
    )
)


def _nm_linear(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    problem: Problem,
    *,
    configuration: Config,
    columns: Tensor | None = None,
) -> Tensor:
    spec: NMSpec = problem.spec
    values, metadata = weight
    y = nm24.linear(
        rows_of(x),
        values,
        metadata,
        bias,
        in_features=spec.in_features,
        out_features=spec.out_features,
        activation=problem.activation,
        config=configuration,
        columns=columns,
    )
    return y.view(*x.shape[:-1], spec.out_features)


select.add_candidate(Candidate(nm.OP, MMA_SP, "cuda", _TEXT, _serves, _nm_linear, configurations, gathers=True))
select.add_candidate(reference.unpacked(nm.OP, MMA_SP))


# int8_linear


def _scales(spec: Int8Spec) -> dict[str, Held]:
    return {name: held for name, held in int8.tensors(spec).items() if "scale" in name}


def _int8_to_neutral(weight: list[Tensor], spec: Int8Spec) -> list[Tensor]:
    return [*_nm_to_neutral(weight[:2], spec), *weight[2:]]


layouts.add(
    Layout(
        int8.OP,
        MMA_SP,
        lambda spec: _held(spec, 1, torch.int8) | _scales(spec),
        _holds,
        from_neutral=lambda weight, spec, dtype: [*_nm_from_neutral(weight[:2], spec, dtype), *weight[2:]],
        to_neutral=_int8_to_neutral,
        to_dense=lambda weight, spec, dtype: int8.unpack(_int8_to_neutral(weight, spec), spec, dtype),
    )
)


def _int8_multiply(
    q: Tensor,
    s: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    problem: Problem,
    *,
    configuration: Config,
    output_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    spec: Int8Spec = problem.spec
    values, metadata, scales, *_ = weight
    # The kernel reads fp32 scales; tensors that are so already are not copied.
    return nm24.linear(
        q,
        values,
        metadata,
        calls.bias_of(bias),
        in_features=spec.in_features,
        out_features=spec.out_features,
        activation=problem.activation,
        config=configuration,
        x_scale=s,
        scales=scales.float(),
        dtype=problem.dtype,
        output_scale=None if output_scale is None else output_scale.float(),
        y_scale=y_scale,
    )


_KERNELS = int8.Kernels(_int8_multiply, calls.quantize, requantizes=True)
select.add_candidate(Candidate(int8.OP, MMA_SP, "cuda", _TEXT, _serves, _KERNELS, configurations))


def _unpacked_sums(q: Tensor, s: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    neutral = _int8_to_neutral(weight, problem.spec)
    return int8.multiply_exactly(q, s, neutral, bias, problem._replace(layout=NEUTRAL))


select.add_candidate(
    Candidate(
        int8.OP,
        MMA_SP,
        "reference",
        "unpacks on every call, then exact sums through fp32 matmuls",
        reference.always,
        int8.Kernels(_unpacked_sums),
    )
)


# low_rank_sparse_linear


def _low_rank_held(spec: LowRankSparseSpec) -> dict[str, Held]:
    rank = padded_rank(spec.rank)
    blocks = -(-spec.out_features // mma_sp.BLOCK_FEATURES)
    return {
        "u": Held((blocks, rank // RANK_MULTIPLE, 1024), COMPUTE),
        "v": Held((rank, spec.in_features), COMPUTE),
        **{f"sparse.{name}": held for name, held in _held(spec, 2, COMPUTE).items()},
    }


def _low_rank_from_neutral(weight: list[Tensor], spec: LowRankSparseSpec, dtype: torch.dtype) -> list[Tensor]:
    u, v, *sparse = weight
    more = padded_rank(spec.rank) - spec.rank
    return [mma_sp.pack_factor(F.pad(u, (0, more))), F.pad(v, (0, 0, 0, more)), *_nm_from_neutral(sparse, spec, dtype)]


def _low_rank_to_neutral(weight: list[Tensor], spec: LowRankSparseSpec) -> list[Tensor]:
    u, v, *sparse = weight
    # Copies: slices would keep the padded factors alive.
    factors = [mma_sp.unpack_factor(u, spec.out_features)[:, : spec.rank].clone(), v[: spec.rank].clone()]
    return [*factors, *_nm_to_neutral(sparse, spec)]


layouts.add(
    Layout(
        low_rank_sparse.OP,
        MMA_SP,
        _low_rank_held,
        _holds,
        _low_rank_from_neutral,
        _low_rank_to_neutral,
        to_dense=lambda weight, spec, dtype: low_rank_sparse.unpack(_low_rank_to_neutral(weight, spec), spec),
        castable=False,
    )
)


def _low_rank_sparse_linear(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, *, configuration: Config
) -> Tensor:
    spec: LowRankSparseSpec = problem.spec
    u, v, values, metadata = weight
    rows = rows_of(x)
    y = nm24.linear(
        rows,
        values,
        metadata,
        bias,
        in_features=spec.in_features,
        out_features=spec.out_features,
        activation=problem.activation,
        config=configuration,
        t=F.linear(rows, v),
        u=u,
    )
    return y.view(*x.shape[:-1], spec.out_features)


def _low_rank_reference(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    return low_rank_sparse.multiply(x, _low_rank_to_neutral(weight, problem.spec), bias, problem)


select.add_candidate(
    Candidate(
        low_rank_sparse.OP,
        MMA_SP,
        "cuda",
        f"{_TEXT}, factors into the same sum, after x vᵀ",
        _serves,
        _low_rank_sparse_linear,
        configurations,
    )
)
select.add_candidate(
    Candidate(
        low_rank_sparse.OP,
        MMA_SP,
        "reference",
        "unpacks on every call, then torch's linear on each factor and on the sparse part",
        reference.always,
        _low_rank_reference,
    )
)
