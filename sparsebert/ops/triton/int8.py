"""Triton's candidates for ``int8_linear``, for the ops on int8 rows, and for ``quantize_rows``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparsebert.ops import int8, quantized, select
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.triton.configurations import around, columns, fitting, shared_bytes
from sparsebert.ops.triton.nm import packed_bytes, slot_by_slot
from sparsebert.ops.triton.support import refusal, rows_of

if TYPE_CHECKING:
    from sparsebert.kernels.tiles import Config


def _patterned(problem: Problem) -> bool:
    return problem.layout == NEUTRAL and problem.spec.m > 1


@lru_cache(maxsize=1024)
def configurations(problem: Problem) -> Sequence[Config]:
    """As for ``nm_linear``."""
    spec: Any = problem.spec
    n, m = (spec.n, spec.m) if _patterned(problem) else (1, 1)
    slow = m > 1 and slot_by_slot(n, m)
    block_n = columns(problem.tokens, 64 if slow else 128)
    block_m = 64 if block_n < 64 or slow else 128
    found = around(problem, block_m, block_n, 64 if slow else 128, itemsize=1, full=slow)
    weight = packed_bytes(n, m, 1) if m > 1 else 1
    return fitting(
        problem, found, lambda config: shared_bytes(config, weight_bytes=weight, dense_bytes=m > 1, x_bytes=1)
    )


def _quantize(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    from sparsebert.kernels.quantize_rows import quantize_rows

    return quantize_rows(rows_of(x), input_scale)


def _multiply(
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
    from sparsebert.kernels.int8_linear import int8_linear

    spec: Any = problem.spec
    patterned = _patterned(problem)
    values, *rest = weight
    positions = rest.pop(0) if patterned else None
    return int8_linear(
        q,
        s,
        values,
        positions,
        rest[0],
        bias,
        n=spec.n if patterned else 1,
        m=spec.m if patterned else 1,
        activation=problem.activation,
        dtype=problem.dtype,
        config=configuration,
        output_scale=output_scale,
        y_scale=y_scale,
    )


def _quantize_rows(x: Tensor, input_scale: Tensor | None, problem: Problem) -> tuple[Tensor, Tensor]:
    from sparsebert.kernels.quantize_rows import quantize_rows

    q, s = quantize_rows(rows_of(x), input_scale, activation=problem.activation)
    return q.view(x.shape), s.view(x.shape[:-1])


_KERNELS = int8.Kernels(_multiply, _quantize, requantizes=True)
for _layout, _text in (
    (NEUTRAL, "Triton: int8 tensor cores, an n:m weight unpacked in registers"),
    (int8.UNPACKED, "Triton: int8 tensor cores"),
):
    select.add_candidate(Candidate(int8.OP, _layout, "triton", _text, refusal, _KERNELS, configurations))
select.add_candidate(
    Candidate(quantized.OP, NEUTRAL, "triton", "Triton: a program a row, read once", refusal, _quantize_rows)
)
