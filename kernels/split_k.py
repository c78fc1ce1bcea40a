"""Sums what the programs of a product that is split along its inner dimension left, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels.launch import await_previous, launch_options, release_next
from sparsebert.kernels.tiles import activate, to_int8

BLOCK = 1024


@triton.jit
def _sum_splits_kernel(
    partial_ptr,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    output_scale_ptr,
    y_scale_ptr,
    count,
    out_features,
    SPLIT_K: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous(PDL)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    features = places % out_features
    total = tl.zeros((BLOCK,), dtype=partial_ptr.dtype.element_ty)
    partials = partial_ptr + places
    for _ in tl.static_range(SPLIT_K):
        total += tl.load(partials, mask=mask, other=0)
        partials += count
    release_next(PDL)
    y = total.to(tl.float32)
    if SCALED:
        x_scale = tl.load(x_scale_ptr + places // out_features, mask=mask, other=0.0)
        y *= x_scale
        y *= tl.load(scale_ptr + features, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + features, mask=mask, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    if y_ptr.dtype.element_ty == tl.int8:
        output_scale = tl.load(output_scale_ptr).to(tl.float32)
        y = to_int8(y * tl.div_rn(1.0, output_scale))
        # Once a token. What was not finite stays so.
        y_scale = x_scale * 0.0 + output_scale
        tl.store(y_scale_ptr + places // out_features, y_scale, mask=mask & (features == 0))
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=mask)


def sum_splits(
    partial: Tensor,
    bias: Tensor | None,
    activation: str,
    y: Tensor,
    *,
    x_scale: Tensor | None = None,
    scales: Tensor | None = None,
    output_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """``partial (splits, tokens, out)``, fp32 or int32 -> ``y (tokens, out)`` = activation(their sum [s_x s_w] + bias),
    in place; ``x_scale (tokens)`` and ``scales (out)``, or neither. An int8 y is rounded by ``output_scale ()``, and
    ``y_scale (tokens)`` written."""
    count = y.numel()
    _sum_splits_kernel[(triton.cdiv(count, BLOCK),)](
        partial,
        x_scale,
        scales,
        bias,
        y,
        output_scale,
        y_scale,
        count,
        y.shape[1],
        SPLIT_K=partial.shape[0],
        SCALED=scales is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        BLOCK=BLOCK,
        **launch_options(y),
        enable_fp_fusion=output_scale is None,
    )
    return y
