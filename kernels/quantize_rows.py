"""Rows of floats -> int8 and a scale each, by the frozen rounding of ``formats.int8``; or all by one given scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Longest row that one program holds at once; longer ones are read twice.
LONGEST = 8192
# formats.int8.TINY
_TINY = tl.constexpr(2.0**-118)
# Added and taken away, it leaves a float32 below 2**22 rounded to the nearest whole number, ties to even.
_ROUND = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    input_scale_ptr,
    q_ptr,
    scale_ptr,
    features,
    x_stride,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BLOCK)
    if STATIC:
        inverse = tl.div_rn(1.0, tl.load(input_scale_ptr).to(tl.float32))
    else:
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        wrong = tl.zeros((BLOCK,), dtype=tl.int32)
        for block in tl.static_range(BLOCKS):
            columns = block * BLOCK + inner
            x = tl.load(x_ptr + row * x_stride + columns, mask=columns < features, other=0.0).to(tl.float32)
            # A maximum passes NaN over, so these are looked for.
            wrong |= (x != x).to(tl.int32)
            largest = tl.maximum(largest, tl.abs(x))
        amax = tl.max(largest, axis=0)
        tiny = amax < _TINY
        divisor = tl.where(tiny, 1.0, amax)
        inverse = tl.where(tiny, 0.0, tl.div_rn(127.0, divisor))
        scale = tl.where(tiny, 1.0, tl.div_rn(divisor, 127.0))
        tl.store(scale_ptr + row, tl.where(tl.max(wrong, axis=0) > 0, float("nan"), scale))
    for block in tl.static_range(BLOCKS):
        columns = block * BLOCK + inner
        mask = columns < features
        x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        # Clamped first: the bounds are whole numbers, so rounding does not leave them.
        scaled = tl.minimum(tl.maximum(x * inverse, -127.0), 127.0)
        tl.store(q_ptr + row * features + columns, ((scaled + _ROUND) - _ROUND).to(tl.int8), mask=mask)


def quantize_rows(x: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x (rows, features)`` with rows that may be further apart -> ``q int8 (rows, features)`` and ``scale fp32
    (rows)``, or, with ``input_scale ()``, that scale as ``fp32 (1)``."""
    rows, features = x.shape
    q = x.new_empty((rows, features), dtype=torch.int8)
    scale = x.new_empty(rows, dtype=torch.float32) if input_scale is None else input_scale.float().reshape(1)
    if rows and features:
        block = min(LONGEST, triton.next_power_of_2(features))
        _quantize_rows_kernel[(rows,)](
            x,
            input_scale,
            q,
            scale,
            features,
            x.stride(0),
            STATIC=input_scale is not None,
            BLOCK=block,
            BLOCKS=triton.cdiv(features, block),
            num_warps=max(1, min(8, block // 256)),
            # The product has to be rounded before _ROUND is added.
            enable_fp_fusion=False,
        )
    elif input_scale is None:
        scale.fill_(1.0)
    return q, scale
