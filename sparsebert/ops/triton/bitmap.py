"""Triton's candidates for ``bitmap_linear``, and the layout ``chunked``, with which programs share the inputs of a
tile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.formats.common import unpack_bits
from sparsebert.ops import bitmap, layouts, reference, select
from sparsebert.ops.devices import describe
from sparsebert.ops.layouts import NEUTRAL, Held, Layout
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import BitmapSpec
from sparsebert.ops.triton.configurations import around, columns, fitting, shared_bytes
from sparsebert.ops.triton.support import refusal, rows_of

if TYPE_CHECKING:
    from sparsebert.kernels.tiles import Config

# Beside values and bitmap: where the values of every CHUNK inputs of a row begin, 1/8 of a bit a weight. The tiles of
# the kernel divide a chunk.
CHUNKED = "chunked"
CHUNK = 256
_MOST = torch.iinfo(torch.int32).max


@lru_cache(maxsize=1024)
def configurations(problem: Problem) -> Sequence[Config]:
    """64 features, the rows of a Hopper MMA. Few tokens: as many inputs a step as give each thread 4 bytes of bits;
    many: half as many, and more tokens an unpacked tile."""
    itemsize = problem.dtype.itemsize
    # Wider tiles of fp32 spill.
    block_n = columns(problem.tokens, 128 if itemsize == 2 else 32)
    block_k = (256 if block_n <= 32 else 128) // itemsize
    splits = _chunks(problem.spec) if problem.layout == CHUNKED else 1
    # Values of 2 bytes pass through registers; those of 4 are copied to shared memory, steps ahead.
    weight = 0 if itemsize == 2 else itemsize
    return fitting(
        problem,
        around(problem, 64, block_n, block_k, itemsize=itemsize, wide=True, splits=splits),
        lambda config: shared_bytes(config, weight_bytes=weight, dense_bytes=itemsize, x_bytes=itemsize),
    )


def _run(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, *, configuration: Config) -> Tensor:
    from sparsebert.kernels.bitmap_linear import bitmap_linear

    values, bits, starts = weight
    y = bitmap_linear(
        rows_of(x),
        values,
        bits,
        starts,
        bias,
        activation=problem.activation,
        config=configuration,
        chunk=CHUNK if problem.layout == CHUNKED else 0,
    )
    return y.view(*x.shape[:-1], problem.out_features)


# The layout of chunks


def _chunks(spec: BitmapSpec) -> int:
    return -(-spec.in_features // CHUNK)


def _chunked_tensors(spec: BitmapSpec) -> dict[str, Held]:
    held = bitmap.tensors(spec)
    return {
        "values": held["values"],
        "bitmap": held["bitmap"],
        "starts": Held((spec.out_features, _chunks(spec)), torch.int32),
    }


def _chunked_refusal(spec: BitmapSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    if spec.nnz > _MOST:
        return f"needs at most {_MOST} non-zeros, not {spec.nnz}"
    return refusal(Problem(CHUNKED, describe(device), dtype, spec, 1, "none"))


def _chunk(weight: list[Tensor], spec: BitmapSpec, dtype: torch.dtype) -> list[Tensor]:
    values, bits, row_offsets = weight
    padded = F.pad(bits, (0, _chunks(spec) * CHUNK // 8 - bits.shape[1]))
    counts = unpack_bits(padded, 1, _chunks(spec) * CHUNK).view(len(bits), -1, CHUNK).sum(-1)
    starts = row_offsets[:-1, None] + counts.cumsum(1) - counts
    return [values, bits, starts.to(torch.int32)]


def _unchunk(weight: list[Tensor], spec: BitmapSpec) -> list[Tensor]:
    values, bits, starts = weight
    return [values, bits, F.pad(starts[:, 0].long(), (0, 1), value=spec.nnz)]


layouts.add(
    Layout(
        bitmap.OP,
        CHUNKED,
        _chunked_tensors,
        _chunked_refusal,
        from_neutral=_chunk,
        to_neutral=_unchunk,
        to_dense=lambda weight, spec, dtype: bitmap.unpack(_unchunk(weight, spec), spec),
    )
)
select.add_candidate(reference.unpacked(bitmap.OP, CHUNKED))
for _layout in (NEUTRAL, CHUNKED):
    select.add_candidate(
        Candidate(
            bitmap.OP,
            _layout,
            "triton",
            "Triton: tiles unpacked in registers, dense tensor cores",
            refusal,
            _run,
            configurations,
        )
    )
