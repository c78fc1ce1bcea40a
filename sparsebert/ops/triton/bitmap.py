"""Triton's candidate for ``bitmap_linear``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from sparsebert.ops import bitmap, select
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.triton.configurations import columns
from sparsebert.ops.triton.support import refusal, rows_of

if TYPE_CHECKING:
    from sparsebert.kernels.tiles import Config


@lru_cache(maxsize=1024)
def configurations(problem: Problem) -> Sequence[Config]:
    """Where a row's values lie is counted along the row, so nothing is split."""
    from sparsebert.kernels.tiles import Config

    itemsize = problem.dtype.itemsize
    block_n = columns(problem.tokens, 128 // itemsize)
    return [Config(64, block_n, 64 if itemsize == 2 else 32, num_warps=8)]


def _run(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, *, configuration: Config) -> Tensor:
    from sparsebert.kernels.bitmap_linear import bitmap_linear

    values, bits, row_offsets = weight
    y = bitmap_linear(rows_of(x), values, bits, row_offsets, bias, activation=problem.activation, config=configuration)
    return y.view(*x.shape[:-1], problem.out_features)


select.add_candidate(
    Candidate(
        bitmap.OP,
        NEUTRAL,
        "triton",
        "Triton: tiles unpacked in registers, dense tensor cores",
        refusal,
        _run,
        configurations,
    )
)
