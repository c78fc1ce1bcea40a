"""Rows of floats, or an activation of them, -> int8 and a scale each, by the frozen rounding of ``formats.int8``; or
all by one given scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels.launch import await_previous, launch_options, release_next
from sparsebert.kernels.tiles import activate, to_int8

# Longest row that one program holds at once; longer ones are read twice.
LONGEST = 8192
# formats.int8.TINY
_TINY = tl.constexpr(2.0**-118)


@triton.jit
def _load(x_ptr, row, x_stride, columns, features, ACTIVATION: tl.constexpr):
    x = tl.load(x_ptr + row * x_stride + columns, mask=columns < features, other=0.0).to(tl.float32)
    return activate(x, ACTIVATION)


@triton.jit
def scale_of_row(amax, no_nan, input_scale_ptr, STATIC: tl.constexpr):
    """The scale of a row, and what it is multiplied by, of its largest magnitude and whether there is no NaN in it; of
    a row that is not finite the scale shows it."""
    if STATIC:
        scale = tl.load(input_scale_ptr).to(tl.float32)
        inverse = tl.div_rn(1.0, scale)
        finite = no_nan & (amax < float("inf"))
    else:
        tiny = amax < _TINY
        divisor = tl.where(tiny, 1.0, amax)
        inverse = tl.where(tiny, 0.0, tl.div_rn(127.0, divisor))
        scale = tl.where(tiny, 1.0, tl.div_rn(divisor, 127.0))
        finite = no_nan
    return tl.where(finite, scale, float("nan")), inverse


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    input_scale_ptr,
    q_ptr,
    scale_ptr,
    features,
    x_stride,
    STATIC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BLOCK)
    first = _load(x_ptr, row, x_stride, inner, features, ACTIVATION)
    largest = tl.abs(first)
    # A maximum passes NaN over, so these are looked for.
    wrong = (first != first).to(tl.int32)
    for block in tl.static_range(1, BLOCKS):
        x = _load(x_ptr, row, x_stride, block * BLOCK + inner, features, ACTIVATION)
        wrong |= (x != x).to(tl.int32)
        largest = tl.maximum(largest, tl.abs(x))
    amax = tl.max(largest, axis=0)
    scale, inverse = scale_of_row(amax, tl.max(wrong, axis=0) == 0, input_scale_ptr, STATIC)
    release_next(PDL)
    tl.store(scale_ptr + row, scale)
    for block in tl.static_range(BLOCKS):
        columns = block * BLOCK + inner
        if block == 0:
            x = first
        else:
            x = _load(x_ptr, row, x_stride, columns, features, ACTIVATION)
        tl.store(q_ptr + row * features + columns, to_int8(x * inverse), mask=columns < features)


def quantize_rows(x: Tensor, input_scale: Tensor | None = None, *, activation: str = "none") -> tuple[Tensor, Tensor]:
    """``x (rows, features)`` with rows that may be further apart -> ``q int8 (rows, features)`` and ``scale fp32
    (rows)`` of activation(x) in fp32; with ``input_scale ()`` by that scale. A row that is not finite has NaN or an
    infinity as its scale."""
    rows, features = x.shape
    q = x.new_empty((rows, features), dtype=torch.int8)
    scale = x.new_empty(rows, dtype=torch.float32)
    if not rows:
        return q, scale
    block = min(LONGEST, triton.next_power_of_2(max(1, features)))
    _quantize_rows_kernel[(rows,)](
        x,
        input_scale,
        q,
        scale,
        features,
        x.stride(0),
        STATIC=input_scale is not None,
        ACTIVATION=activation,
        BLOCK=block,
        BLOCKS=max(1, triton.cdiv(features, block)),
        num_warps=max(1, min(8, block // 256)),
        **launch_options(x),
        # The product has to be rounded before ``to_int8`` rounds it to a whole number.
        enable_fp_fusion=False,
    )
    return q, scale
