"""y = activation((q_x Q_wᵀ) s_x s_w + b): products of int8 summed exactly in int32, the scales applied in fp32.

The weight is dense int8, or at KEEP of GROUP and unpacked in registers. Features are the rows of the product and tokens
its columns, as in ``nm_linear``; both operands lie along the inputs, as int8 tensor cores want them. y is a float, or
int8 again by a given scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels.launch import await_previous, launch_options, release_next
from sparsebert.kernels.split_k import sum_splits
from sparsebert.kernels.tiles import Config, load_nm_tile, store_partial, store_tile, tile_edges


@triton.jit
def _int8_linear_kernel(
    q_ptr,
    values_ptr,
    positions_ptr,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    output_scale_ptr,
    y_scale_ptr,
    tokens,
    in_features,
    out_features,
    kept,
    position_bytes,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous(PDL)
    rows, row_mask, columns, column_mask = tile_edges(tokens, out_features, BLOCK_M, BLOCK_N)
    split = tl.program_id(2)

    inner = tl.arange(0, BLOCK_K)
    q_ptrs = q_ptr + columns[None, :].to(tl.int64) * in_features + inner[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(split * BLOCK_K, in_features, SPLIT_K * BLOCK_K):
        inside = inner < in_features - k
        if GROUP == 1:
            weight = tl.load(
                values_ptr + rows[:, None].to(tl.int64) * in_features + (k + inner)[None, :],
                mask=row_mask[:, None] & inside[None, :],
                other=0,
            )  # [BLOCK_M, BLOCK_K]
        else:
            weight = load_nm_tile(
                values_ptr, positions_ptr, rows, row_mask, k, kept, position_bytes, KEEP, GROUP, BITS, BLOCK_M, BLOCK_K
            )
        q = tl.load(q_ptrs + k, mask=column_mask[None, :] & inside[:, None], other=0)  # [BLOCK_K, BLOCK_N]
        accumulator = tl.dot(weight, q, accumulator, out_dtype=tl.int32)

    release_next(PDL)
    if SPLIT_K > 1:
        store_partial(accumulator, y_ptr, split, rows, row_mask, columns, column_mask, tokens, out_features)
    else:
        x_scale = tl.load(x_scale_ptr + columns, mask=column_mask, other=0.0)
        y = accumulator.to(tl.float32) * x_scale[None, :]
        y *= tl.load(scale_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        y_inverse = 1.0
        if y_ptr.dtype.element_ty == tl.int8:
            output_scale = tl.load(output_scale_ptr).to(tl.float32)
            y_inverse = tl.div_rn(1.0, output_scale)
            # Once a token. What was not finite stays so.
            y_scale = x_scale * 0.0 + output_scale
            tl.store(y_scale_ptr + columns, y_scale, mask=column_mask & (tl.program_id(0) == 0))
        store_tile(
            y, bias_ptr, y_ptr, rows, row_mask, columns, column_mask, out_features, HAS_BIAS, ACTIVATION, y_inverse
        )


def int8_linear(
    q: Tensor,
    x_scale: Tensor,
    values: Tensor,
    positions: Tensor | None,
    scales: Tensor,
    bias: Tensor | None,
    *,
    n: int,
    m: int,
    activation: str,
    dtype: torch.dtype,
    config: Config,
    output_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """``q int8 (tokens, in)`` with ``x_scale fp32 (tokens)``; ``values int8 (out, in n / m)``, ``positions`` unless m
    is 1, ``scales (out)``, ``bias (out)`` -> ``y (tokens, out)`` in ``dtype``. With ``output_scale ()`` y is int8, and
    its scales are written to ``y_scale fp32 (tokens)``."""
    tokens, in_features = q.shape
    out_features, kept = values.shape
    y = q.new_empty((tokens, out_features), dtype=dtype if output_scale is None else torch.int8)
    if not y.numel():
        return y
    split = config.split_k > 1
    target = q.new_empty((config.split_k, tokens, out_features), dtype=torch.int32) if split else y
    grid = (triton.cdiv(out_features, config.block_m), triton.cdiv(tokens, config.block_n), config.split_k)
    _int8_linear_kernel[grid](
        q,
        values,
        positions,
        x_scale,
        scales,
        bias,
        target,
        output_scale,
        y_scale,
        tokens,
        in_features,
        out_features,
        kept,
        0 if positions is None else positions.shape[1],
        KEEP=n,
        GROUP=m,
        BITS=2 if m <= 4 else 4,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(q),
        # Only where y is rounded to a whole number does it matter that it is rounded before.
        enable_fp_fusion=output_scale is None,
    )
    if not split:
        return y
    return sum_splits(
        target, bias, activation, y, x_scale=x_scale, scales=scales, output_scale=output_scale, y_scale=y_scale
    )
