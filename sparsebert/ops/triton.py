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
from torch import Tensor

from sparsebert.ops import int8, nm, select
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.select import Candidate, Problem

if TYPE_CHECKING:
    from sparsebert.kernels.nm_linear import Config

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
    from sparsebert.kernels.nm_linear import Config

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
    from sparsebert.kernels.nm_linear import Config

    block_n = min(128, max(16, 1 << (tokens - 1).bit_length()))
    block_m = 64 if block_n < 64 else 128
    tiles = -(-out_features // block_m) * -(-tokens // block_n)
    split_k = split_of(tiles, -(-in_features // 128), sms)
    return Config(block_m, block_n, 128, split_k, num_warps=8 if block_m * block_n > 64 * 64 else 4)


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


for _op, _layout, _text, _run in (
    (nm.OP, NEUTRAL, "Triton: tiles unpacked in registers, dense tensor cores", _run_nm),
    (int8.OP, NEUTRAL, "Triton: int8 tensor cores, an n:m weight unpacked in registers", _run_int8),
    (int8.OP, int8.UNPACKED, "Triton: int8 tensor cores", _run_int8),
):
    select.add_candidate(Candidate(_op, _layout, "triton", _text, refusal, _run))
