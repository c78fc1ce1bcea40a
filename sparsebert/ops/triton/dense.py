"""Triton's candidates for ``dense_linear``, where an activation follows the product.

Without one torch's linear is not replaced. With one, a launch is saved and a pass over y, which is read and written
again: 4 bytes an output of 16 bits, beside 2 in_features operations of the product. A GPU whose product reaches 600
Tflop/s at 4.8 TB/s (an H200, about) does 250 / in_features of it in the time of that pass, so with 768 inputs the
product may be slower than cuBLAS's by 0.33 of its time, with 1024 by 0.24, before anything is lost; by less where y
stays in L2. That is arithmetic and no measurement: it is why the kernel runs unmeasured. ``sb.tune`` measures both of a
packed dense layer with an activation, and what it found then counts, also for a layer of the same size that is an
``nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsebert.ops import dense, select
from sparsebert.ops.layouts import DENSE, NEUTRAL
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.triton.configurations import MOST_SPLITS, around, columns, fitting, shared_bytes, sms
from sparsebert.ops.triton.support import refusal, rows_of

if TYPE_CHECKING:
    from sparsebert.kernels.tiles import Config


def _refusal(problem: Problem) -> str | None:
    if reason := refusal(problem):
        return reason
    if problem.activation == "none":
        return "nothing to fuse: torch's own linear is as good"
    if problem.dtype == torch.float32:
        # Ten times the operations a byte: the pass is a few hundredths of the product, which torch may do in tf32.
        return "needs float16 or bfloat16: in float32 what fusing saves is little beside the product"
    return None


@lru_cache(maxsize=1024)
def configurations(problem: Problem) -> Sequence[Config]:
    """128 features, 64 where tokens are few, or where tiles would leave multiprocessors idle; then half the tokens too.
    Splits for few tokens alone: beyond, their sums are more bytes than the pass that fusing saves."""
    itemsize = problem.dtype.itemsize
    block_n = columns(problem.tokens, 256 // itemsize)
    few = block_n < 64
    block_m = 64 if few or _tiles(problem, 128, block_n) < sms(problem) else 128
    if block_n > 64 and _tiles(problem, block_m, block_n) < sms(problem):
        block_n //= 2
    splits = MOST_SPLITS if few else 1
    return fitting(
        problem,
        around(problem, block_m, block_n, 128 // itemsize, itemsize=itemsize, splits=splits),
        lambda config: shared_bytes(config, weight_bytes=itemsize, dense_bytes=0, x_bytes=itemsize),
    )


def _tiles(problem: Problem, block_m: int, block_n: int) -> int:
    return -(-problem.out_features // block_m) * -(-max(1, problem.tokens) // block_n)


def _run(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, *, configuration: Config) -> Tensor:
    from sparsebert.kernels.dense_linear import dense_linear

    # Those of an nn.Linear, which may be views of something else.
    y = dense_linear(
        rows_of(x),
        rows_of(weight[0]),
        None if bias is None else bias.contiguous(),
        activation=problem.activation,
        config=configuration,
    )
    return y.view(*x.shape[:-1], problem.out_features)


for _layout in (NEUTRAL, DENSE):
    select.add_candidate(
        Candidate(
            dense.OP,
            _layout,
            "triton",
            "Triton: bias and activation as the product is written",
            _refusal,
            _run,
            configurations,
        )
    )
