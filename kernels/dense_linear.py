"""y = activation(x Wᵀ + b) with a dense W: bias and activation in the epilogue of the product, so that y is written
once and not read again.

Features are the rows of the product and tokens its columns, as in ``nm_linear``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels.launch import await_previous, launch_options, release_next
from sparsebert.kernels.split_k import sum_splits
from sparsebert.kernels.tiles import Config, store_partial, store_tile, tile_edges


@triton.jit
def _dense_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    in_features,
    out_features,
    x_stride,
    weight_stride,
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
    weight_ptrs = weight_ptr + rows[:, None].to(tl.int64) * weight_stride + inner[None, :]
    x_ptrs = x_ptr + columns[None, :].to(tl.int64) * x_stride + inner[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Every split takes each SPLIT_K-th step.
    for k in range(split * BLOCK_K, in_features, SPLIT_K * BLOCK_K):
        inside = inner < in_features - k
        weight = tl.load(weight_ptrs + k, mask=row_mask[:, None] & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptrs + k, mask=column_mask[None, :] & inside[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        accumulator = tl.dot(weight, x, accumulator, input_precision="ieee")

    release_next(PDL)
    if SPLIT_K > 1:
        store_partial(accumulator, y_ptr, split, rows, row_mask, columns, column_mask, tokens, out_features)
    else:
        store_tile(
            accumulator, bias_ptr, y_ptr, rows, row_mask, columns, column_mask, out_features, HAS_BIAS, ACTIVATION
        )


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str, config: Config) -> Tensor:
    """``x (tokens, in)`` and ``weight (out, in)`` with rows that may be further apart, ``bias (out)`` -> ``(tokens,
    out)``, all of one dtype."""
    tokens, in_features = x.shape
    out_features = weight.shape[0]
    y = x.new_empty(tokens, out_features)
    if not y.numel():
        return y
    split = config.split_k > 1
    target = x.new_empty((config.split_k, tokens, out_features), dtype=torch.float32) if split else y
    grid = (triton.cdiv(out_features, config.block_m), triton.cdiv(tokens, config.block_n), config.split_k)
    _dense_linear_kernel[grid](
        x,
        weight,
        bias,
        target,
        tokens,
        in_features,
        out_features,
        x.stride(0),
        weight.stride(0),
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x),
    )
    return sum_splits(target, bias, activation, y) if split else y
