"""Triton's candidate for ``nm_linear``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparsebert.ops import nm, select
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.triton.configurations import around, columns, fitting, shared_bytes
from sparsebert.ops.triton.support import refusal, rows_of

if TYPE_CHECKING:
    from sparsebert.kernels.tiles import Config


def packed_bytes(n: int, m: int, itemsize: int) -> float:
    """Bytes of memory for an element of an n:m weight, positions included, as a tile of it is read."""
    return n / m * (itemsize + (2 if m <= 4 else 4) / 8)


def slot_by_slot(n: int, m: int) -> bool:
    """Whether the kernels take a tile's values one slot after the other, which takes registers for more than a few."""
    return (n, m) not in ((1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (1, 16))


@lru_cache(maxsize=1024)
def configurations(problem: Problem) -> Sequence[Config]:
    """As few token columns as hold the tokens, 64 features (the rows of a Hopper MMA), 128 bytes of inputs a step, or
    half where values are taken slot by slot."""
    spec: Any = problem.spec
    itemsize = problem.dtype.itemsize
    slow = slot_by_slot(spec.n, spec.m)
    block_n = columns(problem.tokens, 64 if slow else 256 // itemsize)
    block_m = 64 if block_n < 64 or itemsize == 4 or slow else 128
    block_k = max((64 if slow else 128) // itemsize, 2 * spec.m)
    found = around(problem, block_m, block_n, block_k, itemsize=itemsize, full=slow)
    weight = packed_bytes(spec.n, spec.m, itemsize)
    return fitting(
        problem,
        found,
        lambda config: shared_bytes(config, weight_bytes=weight, dense_bytes=itemsize, x_bytes=itemsize),
    )


def _run(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, *, configuration: Config) -> Tensor:
    from sparsebert.kernels.nm_linear import nm_linear

    spec: Any = problem.spec
    values, positions = weight
    y = nm_linear(
        rows_of(x),
        values,
        positions,
        bias,
        n=spec.n,
        m=spec.m,
        activation=problem.activation,
        config=configuration,
    )
    return y.view(*x.shape[:-1], spec.out_features)


select.add_candidate(
    Candidate(
        nm.OP,
        NEUTRAL,
        "triton",
        "Triton: tiles unpacked in registers, dense tensor cores",
        refusal,
        _run,
        configurations,
    )
)
