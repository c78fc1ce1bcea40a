"""Triton's candidates for ``add_layer_norm`` and ``add_layer_norm_quantize``: one kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsebert.ops import layer_norm, select
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.triton.support import refusal, rows_of

# A program holds a whole row in registers: on GPUs of any generation no more than this without spilling.
LONGEST = 8192
DESCRIPTION = "Triton: a program a row, held in registers"


def refusal_of_rows(problem: Problem) -> str | None:
    """``supports`` of the kernels that normalize rows."""
    if not 1 <= problem.in_features <= LONGEST:
        return f"needs rows of 1 to {LONGEST} features, not {problem.in_features}"
    return refusal(problem)


def _run(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from sparsebert.kernels.layer_norm import add_layer_norm

    other = None if residual is None else rows_of(residual)
    return add_layer_norm(rows_of(x), other, weight.contiguous(), bias.contiguous(), eps, **options)


def _add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _run(x, residual, weight, bias, eps)[0].view(x.shape)


def _add_layer_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, input_scale: Tensor | None
) -> tuple[Tensor, ...]:
    found = _run(x, residual, weight, bias, eps, quantize=True, input_scale=input_scale)
    return tuple(
        tensor.view(shape)
        for tensor, shape in zip(found, (x.shape, x.shape, x.shape[:-1]), strict=True)
        if tensor is not None
    )


for _op, _kernel in ((layer_norm.OP, _add_layer_norm), (layer_norm.QUANTIZE_OP, _add_layer_norm_quantize)):
    select.add_candidate(Candidate(_op, NEUTRAL, "triton", DESCRIPTION, refusal_of_rows, _kernel))
