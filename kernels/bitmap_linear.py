"""y = activation(x Wᵀ + b) with an unstructured sparse W, on the dense tensor cores: bits and non-zeros cross memory,
and a tile is unpacked in registers.

Where a non-zero's value lies follows from the bits before it, so a program goes along its rows from their beginning.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels.tiles import Config, load_bitmap_tile, store_tile, tile_edges


@triton.jit
def _bitmap_linear_kernel(
    x_ptr,
    values_ptr,
    bitmap_ptr,
    row_offsets_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    in_features,
    out_features,
    x_stride,
    row_bytes,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, row_mask, columns, column_mask = tile_edges(tokens, out_features, BLOCK_M, BLOCK_N)

    inner = tl.arange(0, BLOCK_K)
    begins = tl.load(row_offsets_ptr + rows, mask=row_mask, other=0)
    x_ptrs = x_ptr + columns[None, :].to(tl.int64) * x_stride + inner[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        weight, begins = load_bitmap_tile(
            values_ptr, bitmap_ptr, begins, rows, row_mask, k, row_bytes, BLOCK_M, BLOCK_K
        )
        x = tl.load(
            x_ptrs + k, mask=column_mask[None, :] & (inner < in_features - k)[:, None], other=0.0
        )  # [BLOCK_K, BLOCK_N]
        accumulator = tl.dot(weight, x, accumulator, input_precision="ieee")

    store_tile(accumulator, bias_ptr, y_ptr, rows, row_mask, columns, column_mask, out_features, HAS_BIAS, ACTIVATION)


def bitmap_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_offsets: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    config: Config,
) -> Tensor:
    """``x (tokens, in)`` with rows that may be further apart, ``values (nnz)``, ``bitmap`` and ``row_offsets`` of
    ``formats.bitmap``, ``bias (out)`` -> ``(tokens, out)``, all of one dtype. ``config.split_k`` is 1."""
    tokens, in_features = x.shape
    out_features, row_bytes = bitmap.shape
    y = x.new_empty(tokens, out_features)
    if not y.numel():
        return y
    _bitmap_linear_kernel[(triton.cdiv(out_features, config.block_m), triton.cdiv(tokens, config.block_n))](
        x,
        values,
        bitmap,
        row_offsets,
        bias,
        y,
        tokens,
        in_features,
        out_features,
        x.stride(0),
        row_bytes,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
