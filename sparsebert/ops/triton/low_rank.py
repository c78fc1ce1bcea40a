"""Triton's candidates for low rank, alone and with a sparse part, and their layouts: ``padded``, and ``grouped`` for a
sparse part of whole rows.

Both hold the factors with a rank that is a multiple of 16, zeros at its end, so that each of their rows begins where
16 bytes can be loaded at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.ops import layouts, low_rank, low_rank_sparse, reference, select
from sparsebert.ops.activations import activate
from sparsebert.ops.devices import describe
from sparsebert.ops.layouts import COMPUTE, NEUTRAL, Held, Layout
from sparsebert.ops.low_rank import PADDED, RANK_MULTIPLE, padded_rank
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import LowRankSparseSpec, LowRankSpec
from sparsebert.ops.triton.configurations import around, columns, fitting, power_of_two, shared_bytes
from sparsebert.ops.triton.nm import packed_bytes, slot_by_slot
from sparsebert.ops.triton.support import refusal, rows_of

if TYPE_CHECKING:
    from sparsebert.kernels.low_rank_sparse_linear import Config

# Of a low-rank weight plus whole rows: the rows and the features without one, each in a block of its own.
GROUPED = "grouped"
# Of the ranks that t is computed for inside the kernel, in x's dtype: their sums take registers beside those of y.
_MOST_INSIDE_BYTES = 256


def _spills(config: Config, sparse: str, itemsize: int) -> bool:
    """What ptxas found for compute capabilities 8.0 to 12.0."""
    if itemsize == 4 or sparse == "bitmap":
        wide = config.block_m > 64 or config.block_r > 64
    else:
        wide = sparse == "rows" and config.block_k > 64
    return config.inside and wide


@lru_cache(maxsize=1024)
def configurations(problem: Problem) -> Sequence[Config]:
    """t = x vᵀ inside the kernel is estimated best for a rank of at most 64 and at most 64 tokens, where a launch costs
    more than each program's product of its own."""
    spec: Any = problem.spec
    itemsize = problem.dtype.itemsize
    # Wider tiles spill where the tensor cores take both operands from registers (all but sm_90 and sm_100).
    block_n = columns(problem.tokens, 128 // itemsize)
    sparse = getattr(spec, "sparse", "none")
    slow = sparse == "nm" and slot_by_slot(spec.n, spec.m)
    block_m = 64 if block_n < 64 or itemsize == 4 or sparse == "bitmap" or slow else 128
    block_k = 128 // itemsize
    inside = [spec.rank <= 64 and problem.tokens <= 64]
    if power_of_two(spec.rank) * itemsize <= _MOST_INSIDE_BYTES:
        inside.append(not inside[0])

    def choices(block_m: int) -> list[bool]:
        # Inside is the t of one part, which all features of a tile have to be of. Whole rows mix those of all parts.
        mixed = sparse == "rows" or spec.out_features // spec.parts % block_m
        return [False] if spec.parts > 1 and mixed else inside

    def found() -> Iterator[Config]:
        from sparsebert.kernels.low_rank_sparse_linear import Config

        for tile in around(problem, block_m, block_n, block_k, itemsize=itemsize, wide=True, full=slow, splits=1):
            # Both choices with 3 steps in flight, the better one with other numbers.
            either = choices(tile.block_m)
            for choice in either if tile.num_stages == 3 else either[:1]:
                # 8 warps would load fewer than 32 ranks 8 bytes at a time, and hold a tile of x in two forms for fewer
                # ranks than features.
                least = 64 if sparse == "bitmap" else 32
                block_r = max(least, power_of_two(spec.rank)) if choice else 64 // itemsize
                config = Config(*tile[:3], block_r, choice, tile.num_warps, tile.num_stages)
                if not _spills(config, sparse, itemsize):
                    yield config

    weight = {
        "none": 0,
        "rows": itemsize,
        "nm": packed_bytes(spec.n, spec.m, itemsize) if sparse == "nm" else 0,
        "bitmap": itemsize + 1 / 8,
    }[sparse]

    def shared(config: Config) -> int:
        inputs = shared_bytes(config, weight_bytes=weight, dense_bytes=itemsize, x_bytes=itemsize)
        if config.inside:
            return inputs + config.num_stages * config.block_r * config.block_k * itemsize
        along_rank = config._replace(block_k=config.block_r)
        return max(inputs, shared_bytes(along_rank, weight_bytes=itemsize, dense_bytes=0, x_bytes=itemsize))

    return fitting(problem, found(), shared)


def _run(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, *, configuration: Config) -> Tensor:
    from sparsebert.kernels.low_rank_sparse_linear import low_rank_sparse_linear

    spec: Any = problem.spec
    u, v, *parts = weight
    names = [name.removeprefix("sparse.") for name in layouts.tensors(spec, problem.layout)][2:]
    pattern = {"n": spec.n, "m": spec.m} if spec.op == low_rank_sparse.OP else {}
    y = low_rank_sparse_linear(
        rows_of(x),
        u,
        v,
        dict(zip(names, parts, strict=True)),
        bias,
        **pattern,
        activation=problem.activation,
        config=configuration,
    )
    return y.view(*x.shape[:-1], spec.out_features)


# The layouts


def _pad(u: Tensor, v: Tensor, spec: LowRankSpec | LowRankSparseSpec) -> list[Tensor]:
    if not (more := padded_rank(spec.rank) - spec.rank):
        return [u, v]
    return [F.pad(u, (0, more)), F.pad(v.unflatten(0, (spec.parts, spec.rank)), (0, 0, 0, more)).flatten(0, 1)]


def _unpad(u: Tensor, v: Tensor, spec: LowRankSpec | LowRankSparseSpec) -> list[Tensor]:
    if u.shape[1] == spec.rank:
        return [u, v]
    # Copies: slices would keep the padded factors alive.
    return [u[:, : spec.rank].clone(), torch.cat([part[: spec.rank] for part in v.chunk(spec.parts)])]


def _factors(spec: LowRankSpec | LowRankSparseSpec) -> dict[str, Held]:
    return low_rank.factors(spec, padded_rank(spec.rank))


def _padded_refusal(spec: LowRankSpec | LowRankSparseSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    if getattr(spec, "sparse", None) == "rows":
        return f"needs a sparse part of nm or bitmap, not rows, which the layout {GROUPED!r} is for"
    if not spec.rank % RANK_MULTIPLE:
        return f"is the neutral layout of a rank that is a multiple of {RANK_MULTIPLE}"
    return refusal(Problem(PADDED, describe(device), dtype, spec, 1, "none"))


def _add_padded(op: str, run: Any) -> None:
    neutral = layouts.get(op, NEUTRAL)

    def to_neutral(weight: list[Tensor], spec: Any) -> list[Tensor]:
        return [*_unpad(weight[0], weight[1], spec), *weight[2:]]

    layouts.add(
        Layout(
            op,
            PADDED,
            lambda spec: {**neutral.tensors(spec), **_factors(spec)},
            _padded_refusal,
            from_neutral=lambda weight, spec, dtype: [*_pad(weight[0], weight[1], spec), *weight[2:]],
            to_neutral=to_neutral,
            to_dense=lambda weight, spec, dtype: neutral.to_dense(to_neutral(weight, spec), spec, dtype),
        )
    )
    # What is padded multiplies to zeros.
    select.add_candidate(Candidate(op, PADDED, "reference", "as on neutral", reference.always, run))


_add_padded(low_rank.OP, low_rank.multiply)
_add_padded(low_rank_sparse.OP, low_rank_sparse.multiply)


def _grouped_tensors(spec: LowRankSparseSpec) -> dict[str, Held]:
    return {
        **_factors(spec),
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
    return [*_pad(u, v, spec), torch.cat((places, others.nonzero().flatten().to(torch.int32))), values]


def _ungroup(weight: list[Tensor], spec: LowRankSparseSpec) -> list[Tensor]:
    u, v, order, values = weight
    # A copy, as of the factors.
    return [*_unpad(u, v, spec), order[: spec.count].clone(), values]


def _grouped(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    u, v, order, values = weight
    y = reference.through_u(F.linear(x, v), u, bias, problem.spec.parts)
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


_TEXT = "Triton: sparse part and factors into one sum, in one launch with x vᵀ or after it"
for _op, _layout in (
    (low_rank.OP, NEUTRAL),
    (low_rank.OP, PADDED),
    (low_rank_sparse.OP, NEUTRAL),
    (low_rank_sparse.OP, PADDED),
    (low_rank_sparse.OP, GROUPED),
):
    select.add_candidate(Candidate(_op, _layout, "triton", _TEXT, _refusal, _run, configurations))
