"""Candidates by the wgmma kernel, on compute capability 9.0 alone: what other kernels read too, from the layouts that
are there. Nothing is packed for it: a 2:4 weight runs as it lies on disk, a dense one as torch's linear reads it.

In the layout ``dense`` it is the twin that the 2:4 kernel is held against. A module in that layout calls torch's linear
itself, unless a backend is forced or, in ``dense_linear``, an activation follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sparsebert.ops import bitmap, dense, int8, low_rank, low_rank_sparse, nm, select
from sparsebert.ops.cuda import calls, wgmma, wgmma_layer_norm
from sparsebert.ops.cuda.calls import rows_of
from sparsebert.ops.cuda.wgmma import Config, configurations
from sparsebert.ops.layouts import DENSE, NEUTRAL
from sparsebert.ops.linear_layer_norm import Call, Result
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import LowRankSparseSpec, add_layer_norm_op

_SPARSE = "CUDA: 2:4 on Hopper's sparse tensor cores by wgmma.sp, as it lies on disk"
_DENSE = "CUDA: Hopper's tensor cores by wgmma"


def _positions(weight: list[Tensor], problem: Problem) -> Tensor | None:
    """Beside the kept values, where those are 2:4."""
    return weight[1] if wgmma.pattern_of(problem) == wgmma.NM24 else None


def _linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, *, configuration: Config) -> Tensor:
    """Of a weight whose first tensor is the dense one, or of the neutral tensors at 2:4."""
    y = wgmma.linear(
        rows_of(x),
        weight[0],
        _positions(weight, problem),
        bias,
        activation=problem.activation,
        config=configuration,
    )
    return y.view(*x.shape[:-1], problem.out_features)


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
    positions = _positions(weight, problem)
    scales = weight[1 if positions is None else 2]
    # The kernel reads fp32 scales; tensors that are so already are not copied.
    return wgmma.linear(
        q,
        weight[0],
        positions,
        calls.bias_of(bias),
        activation=problem.activation,
        config=configuration,
        x_scale=s,
        scales=scales.float(),
        dtype=problem.dtype,
        output_scale=None if output_scale is None else output_scale.float(),
        y_scale=y_scale,
    )


def _low_rank_sparse(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, *, configuration: Config
) -> Tensor:
    spec: LowRankSparseSpec = problem.spec
    u, v, values, positions = weight
    rows = rows_of(x)
    y = wgmma.linear(
        rows,
        values,
        positions,
        bias,
        activation=problem.activation,
        config=configuration,
        t=F.linear(rows, v),
        u=u,
        parts=spec.parts,
    )
    return y.view(*x.shape[:-1], spec.out_features)


def _add_layer_norm(call: Call, problem: Problem) -> Result:
    """With all that follows up to the next linear, in one launch."""
    linear = problem._replace(spec=problem.spec.linear)
    weight = call.weight
    more: dict[str, Tensor] = {}
    if linear.op == low_rank_sparse.OP and linear.layout in wgmma.AS_STORED:
        u, v, *weight = weight
        more = {"t": F.linear(call.x, v), "u": u}
    positions = _positions(weight, linear)
    if call.x_scale is not None:
        scales = weight[1 if positions is None else 2]
        more = {"x_scale": call.x_scale, "scales": scales.float()}
    return wgmma_layer_norm.linear_add_layer_norm(
        call.x,
        weight[0],
        positions,
        calls.bias_of(call.bias),
        call.residual,
        call.norm_weight,
        call.norm_bias,
        call.eps,
        dtype=problem.dtype,
        quantize=problem.spec.quantize,
        input_scale=None if call.output_scale is None else call.output_scale.float(),
        **more,  # type: ignore[arg-type]  # tensors alone
    )


_INT8 = int8.Kernels(_int8_multiply, calls.quantize, requantizes=True)

_CANDIDATES: list[tuple[str, str, str, Callable[..., Any]]] = [
    (nm.OP, NEUTRAL, _SPARSE, _linear),
    (dense.OP, NEUTRAL, _DENSE, _linear),
    # Of each of these the first tensor is the dense weight.
    *((op, DENSE, _DENSE, _linear) for op in (nm.OP, dense.OP, bitmap.OP, low_rank.OP, low_rank_sparse.OP)),
    *(
        (low_rank_sparse.OP, layout, f"{_SPARSE}, factors into the same sum, after x vᵀ", _low_rank_sparse)
        for layout in wgmma.AS_STORED
    ),
    (int8.OP, NEUTRAL, f"{_DENSE}, of a 2:4 weight as it lies on disk the sparse ones", _INT8),
    (int8.OP, int8.UNPACKED, _DENSE, _INT8),
]
for _op, _layout, _text, _run in _CANDIDATES:
    select.add_candidate(Candidate(_op, _layout, "cuda", _text, wgmma.refusal, _run, configurations, waits=wgmma.waits))
    for _quantize in (False, True):
        select.add_candidate(
            Candidate(
                add_layer_norm_op(_op, quantize=_quantize),
                _layout,
                "cuda",
                f"{_text}, with LayerNorm in the same launch",
                wgmma_layer_norm.refusal,
                _add_layer_norm,
                waits=wgmma_layer_norm.waits,
            )
        )
