"""Rows, or sums of two, normalized: LayerNorm(x + residual), and if asked the same rows as int8 with a scale each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels.launch import await_previous, launch_options, release_next
from sparsebert.kernels.quantize_rows import scale_of_row
from sparsebert.kernels.tiles import to_int8


@triton.jit
def normalize(x, mask, weight, bias, features, eps):
    """(x - mean) / sqrt(variance + eps) * weight + bias of a row, float32 [BLOCK]: ``mask`` has its ``features``, and
    beyond them x, weight and bias are zero."""
    # Times one: a count of 1 is a constant here, and no tensor.
    count = features * 1.0
    mean = tl.div_rn(tl.sum(x, axis=0), count)
    # Of what is left of the row in registers: E[x²] - E[x]² would cancel where the mean is large.
    centred = tl.where(mask, x - mean, 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, axis=0), count)
    return centred * tl.div_rn(1.0, tl.sqrt_rn(variance + eps)) * weight + bias


@triton.jit
def _add_layer_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    input_scale_ptr,
    y_ptr,
    q_ptr,
    scale_ptr,
    features,
    x_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < features
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
    # Asked for before the sums, which threads wait for each other in.
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    y = normalize(x, mask, weight, bias, features, eps).to(y_ptr.dtype.element_ty)
    if QUANTIZE:
        # What is quantized is y as the next layer would read it. Beyond the row it is zero, or NaN as the row is.
        stored = y.to(tl.float32)
        amax = tl.max(tl.abs(stored), axis=0)
        # A maximum passes NaN over, so these are looked for.
        no_nan = tl.max((stored != stored).to(tl.int32), axis=0) == 0
        scale, inverse = scale_of_row(amax, no_nan, input_scale_ptr, STATIC)
        release_next(PDL)
        tl.store(scale_ptr + row, scale)
        tl.store(q_ptr + row * features + columns, to_int8(stored * inverse), mask=mask)
    else:
        release_next(PDL)
    tl.store(y_ptr + row * features + columns, y, mask=mask)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    quantize: bool = False,
    input_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``x`` and ``residual (rows, features)`` with rows that may be further apart -> ``y (rows, features)`` in x's
    dtype, by ``weight`` and ``bias (features)`` of any float dtype; where ``quantize`` is set also ``q int8 (rows,
    features)`` and ``scale fp32 (rows)`` of y, by ``input_scale ()`` if given. A program holds a row."""
    rows, features = x.shape
    y = x.new_empty((rows, features))
    q = x.new_empty((rows, features), dtype=torch.int8) if quantize else None
    scale = x.new_empty(rows, dtype=torch.float32) if quantize else None
    if not rows:
        return y, q, scale
    block = triton.next_power_of_2(features)
    _add_layer_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        bias,
        input_scale,
        y,
        q,
        scale,
        features,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
        QUANTIZE=quantize,
        STATIC=input_scale is not None,
        BLOCK=block,
        **row_options(x, block),
    )
    return y, q, scale


def row_options(x: Tensor, block: int) -> dict[str, int | bool]:
    """How a program that holds a row of ``block`` numbers is launched, on the device of ``x``."""
    return {
        "num_warps": max(1, min(8, block // 256)),
        **launch_options(x),
        # The product has to be rounded before ``to_int8`` rounds it to a whole number; and y is the same to the bit,
        # quantized or not.
        "enable_fp_fusion": False,
    }
