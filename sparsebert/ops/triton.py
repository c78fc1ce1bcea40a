"""Candidates made of the Triton kernels: which problem each serves, and with which configuration.

A configuration comes from the problem's sizes alone; until ``sb.tune`` has measured others it is an estimate. Triton is
imported, and a kernel compiled, when one is first needed. CPU tensors are served by Triton's interpreter alone, for
tests: where TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.ops import bitmap, int8, layouts, low_rank, low_rank_sparse, nm, reference, select
from sparsebert.ops.activations import activate
from sparsebert.ops.layouts import COMPUTE, NEUTRAL, Held, Layout
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import LowRankSparseSpec

if TYPE_CHECKING:
    from sparsebert.kernels.low_rank_sparse_linear import Config as LowRankConfig
    from sparsebert.kernels.tiles import Config

# Of a low-rank weight plus whole rows: the rows and the features without one, each in a block of its own.
GROUPED = "grouped"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_VERSION = (3, 6)
# Streaming multiprocessors that an estimate fills where no device says how many there are.
_SMS = 132


def refusal(problem: Problem) -> str | None:
    """None, or why no Triton kernel runs on this device and dtype."""
    if problem.device_type == "cuda":
        if problem.capability is not None and problem.capability < (8, 0):
            return f"needs compute capability 8.0, found {problem.capability[0]}.{problem.capability[1]}"
    elif problem.device_type != "cpu" or not interpreting():
        return f"needs a CUDA device, not {problem.device_type}"
    if problem.dtype not in DTYPES:
        names = [str(dtype).removeprefix("torch.") for dtype in (*DTYPES, problem.dtype)]
        return f"needs {', '.join(names[:-1])}, not {names[-1]}"
    if problem.device_type == "cpu" and problem.dtype == torch.bfloat16:
        return "Triton's interpreter has no bfloat16"
    return _missing()


def interpreting() -> bool:
    """Whether Triton runs kernels on CPU tensors, one program after the other."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _missing() -> str | None:
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "Triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_VERSION:
        return f"needs Triton {LEAST_VERSION[0]}.{LEAST_VERSION[1]}, found {version}"
    return None


def split_of(tiles: int, steps: int, sms: int, most: int = 8) -> int:
    """How many programs share the ``steps`` of a tile along the inner dimension, a power of two: as many as fill the
    device and leave each two steps at least."""
    split = 1
    while split < most and 2 * split * tiles <= sms and 4 * split <= steps:
        split *= 2
    return split


@lru_cache(maxsize=64)
def sms_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _SMS


@lru_cache(maxsize=4096)
def nm_config(n: int, m: int, in_features: int, out_features: int, tokens: int, itemsize: int, sms: int) -> Config:
    """The estimate for ``nm_linear``: as few token columns as hold the tokens, 64 features (the rows of a Hopper MMA),
    128 bytes of inputs a step."""
    from sparsebert.kernels.tiles import Config

    block_n = min(256 // itemsize, max(16, 1 << (tokens - 1).bit_length()))
    block_m = 64 if block_n < 64 or itemsize == 4 else 128
    block_k = max(128 // itemsize, 2 * m)
    tiles = -(-out_features // block_m) * -(-tokens // block_n)
    split_k = split_of(tiles, -(-in_features // block_k), sms)
    # Slots that are no power of two leave registers unused: four warps would spill.
    wide = block_m * block_n > 64 * 64 or n & (n - 1)
    return Config(block_m, block_n, block_k, split_k, num_warps=8 if wide else 4)


@lru_cache(maxsize=4096)
def int8_config(in_features: int, out_features: int, tokens: int, sms: int) -> Config:
    """The estimate for ``int8_linear``: as for ``nm_linear``, with 128 inputs a step."""
    from sparsebert.kernels.tiles import Config

    block_n = min(128, max(16, 1 << (tokens - 1).bit_length()))
    block_m = 64 if block_n < 64 else 128
    tiles = -(-out_features // block_m) * -(-tokens // block_n)
    split_k = split_of(tiles, -(-in_features // 128), sms)
    return Config(block_m, block_n, 128, split_k, num_warps=8 if block_m * block_n > 64 * 64 else 4)


@lru_cache(maxsize=4096)
def bitmap_config(tokens: int, itemsize: int) -> Config:
    """The estimate for ``bitmap_linear``: where a row's values lie is counted along the row, so nothing is split."""
    from sparsebert.kernels.tiles import Config

    block_n = min(128 // itemsize, max(16, 1 << (tokens - 1).bit_length()))
    return Config(64, block_n, 64 if itemsize == 2 else 32, num_warps=8)


@lru_cache(maxsize=4096)
def low_rank_config(tokens: int, itemsize: int) -> LowRankConfig:
    """The estimate for ``low_rank_sparse_linear``."""
    from sparsebert.kernels.low_rank_sparse_linear import Config

    # Wider tiles spill where the tensor cores take both operands from registers (all but sm_90 and sm_100).
    block_n = min(128 // itemsize, max(16, 1 << (tokens - 1).bit_length()))
    block_m = 64 if block_n < 64 or itemsize == 4 else 128
    block_k = 128 // itemsize
    return Config(block_m, block_n, block_k, block_k // 2, num_warps=8)


def _rows(x: Tensor) -> Tensor:
    """x as ``(tokens, in)``, each row without gaps."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _run_nm(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    from sparsebert.kernels.nm_linear import nm_linear

    spec: Any = problem.spec
    rows, (values, positions) = _rows(x), weight
    sizes = (spec.in_features, spec.out_features, max(1, problem.tokens))
    config = nm_config(spec.n, spec.m, *sizes, x.element_size(), sms_of(x.device))
    y = nm_linear(rows, values, positions, bias, n=spec.n, m=spec.m, activation=problem.activation, config=config)
    return y.view(*x.shape[:-1], spec.out_features)


def _run_int8(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    from sparsebert.kernels.int8_linear import int8_linear
    from sparsebert.kernels.quantize_rows import quantize_rows

    spec: Any = problem.spec
    patterned = problem.layout == NEUTRAL and spec.m > 1
    values, *rest = weight
    positions = rest.pop(0) if patterned else None
    scales, *static = rest
    q, x_scale = quantize_rows(_rows(x), static[0] if static else None)
    config = int8_config(spec.in_features, spec.out_features, max(1, problem.tokens), sms_of(x.device))
    y = int8_linear(
        q,
        x_scale,
        values,
        positions,
        scales,
        bias,
        n=spec.n if patterned else 1,
        m=spec.m if patterned else 1,
        activation=problem.activation,
        dtype=x.dtype,
        config=config,
    )
    return y.view(*x.shape[:-1], spec.out_features)


def _run_bitmap(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    from sparsebert.kernels.bitmap_linear import bitmap_linear

    config = bitmap_config(max(1, problem.tokens), x.element_size())
    values, bits, row_offsets = weight
    y = bitmap_linear(_rows(x), values, bits, row_offsets, bias, activation=problem.activation, config=config)
    return y.view(*x.shape[:-1], problem.out_features)


def _run_low_rank(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    from sparsebert.kernels.low_rank_sparse_linear import low_rank_sparse_linear

    spec: Any = problem.spec
    rows = _rows(x)
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
        config=low_rank_config(max(1, problem.tokens), x.element_size()),
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
    return refusal(Problem(GROUPED, device.type, select.capability(device), dtype, spec, 1, "none"))


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


def _low_rank_refusal(problem: Problem) -> str | None:
    if problem.layout == NEUTRAL and getattr(problem.spec, "sparse", None) == "rows":
        return f"needs the layout {GROUPED!r}"
    return refusal(problem)


_FUSED = "Triton: sparse part and factors into one sum, one launch after x vᵀ"
for _op, _layout in ((low_rank.OP, NEUTRAL), (low_rank_sparse.OP, NEUTRAL), (low_rank_sparse.OP, GROUPED)):
    select.add_candidate(Candidate(_op, _layout, "triton", _FUSED, _low_rank_refusal, _run_low_rank))

for _op, _layout, _text, _run in (
    (bitmap.OP, NEUTRAL, "Triton: tiles unpacked in registers, dense tensor cores", _run_bitmap),
    (nm.OP, NEUTRAL, "Triton: tiles unpacked in registers, dense tensor cores", _run_nm),
    (int8.OP, NEUTRAL, "Triton: int8 tensor cores, an n:m weight unpacked in registers", _run_int8),
    (int8.OP, int8.UNPACKED, "Triton: int8 tensor cores", _run_int8),
):
    select.add_candidate(Candidate(_op, _layout, "triton", _text, refusal, _run))
