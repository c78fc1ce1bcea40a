"""y = activation(x Wᵀ + b) with W at KEEP of GROUP, on the dense tensor cores: the packed weight crosses memory, and a
tile of it is unpacked in registers.

What this saves is bytes, so it is for few tokens. Features are the rows of the product, W xᵀ, and tokens its columns:
one token then wastes nothing but the width of the smallest tile.
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
def _nm_linear_kernel(
    x_ptr,
    values_ptr,
    positions_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    in_features,
    out_features,
    x_stride,
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
    x_ptrs = x_ptr + columns[None, :].to(tl.int64) * x_stride + inner[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Every split takes each SPLIT_K-th step.
    for k in range(split * BLOCK_K, in_features, SPLIT_K * BLOCK_K):
        weight = load_nm_tile(
            values_ptr, positions_ptr, rows, row_mask, k, kept, position_bytes, KEEP, GROUP, BITS, BLOCK_M, BLOCK_K
        )  # [BLOCK_M, BLOCK_K]
        x = tl.load(
            x_ptrs + k, mask=column_mask[None, :] & (inner < in_features - k)[:, None], other=0.0
        )  # [BLOCK_K, BLOCK_N]
        accumulator = tl.dot(weight, x, accumulator, input_precision="ieee")

    release_next(PDL)
    if SPLIT_K > 1:
        store_partial(accumulator, y_ptr, split, rows, row_mask, columns, column_mask, tokens, out_features)
    else:
        store_tile(
            accumulator, bias_ptr, y_ptr, rows, row_mask, columns, column_mask, out_features, HAS_BIAS, ACTIVATION
        )


def nm_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    *,
    n: int,
    m: int,
    activation: str,
    config: Config,
) -> Tensor:
    """``x (tokens, in)`` with rows that may be further apart, ``values (out, in n / m)`` and ``positions`` of
    ``formats.nm``, ``bias (out)`` -> ``(tokens, out)``, all of one dtype. ``config.block_k`` is a multiple of 8 m."""
    tokens, in_features = x.shape
    out_features, kept = values.shape
    y = x.new_empty(tokens, out_features)
    if not y.numel():
        return y
    split = config.split_k > 1
    target = x.new_empty((config.split_k, tokens, out_features), dtype=torch.float32) if split else y
    grid = (triton.cdiv(out_features, config.block_m), triton.cdiv(tokens, config.block_n), config.split_k)
    _nm_linear_kernel[grid](
        x,
        values,
        positions,
        bias,
        target,
        tokens,
        in_features,
        out_features,
        x.stride(0),
        kept,
        positions.shape[1],
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
        **launch_options(x),
    )
    return sum_splits(target, bias, activation, y) if split else y
