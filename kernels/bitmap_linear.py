"""y = activation(x Wᵀ + b) with an unstructured sparse W, on the dense tensor cores: bits and non-zeros cross memory,
and a tile is unpacked in registers.

Where a non-zero's value lies follows from the bits before it, from where its row begins, or its chunk of a row: where
that is known of chunks, programs share the inputs of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels.launch import await_previous, launch_options, release_next
from sparsebert.kernels.split_k import sum_splits
from sparsebert.kernels.tiles import Config, load_bits, load_set, store_partial, store_tile, tile_edges


@triton.jit
def _bitmap_linear_kernel(
    x_ptr,
    values_ptr,
    bitmap_ptr,
    starts_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    in_features,
    out_features,
    x_stride,
    row_bytes,
    chunks,
    CHUNK: tl.constexpr,
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

    # Every split takes a run of whole chunks, and each as many as the others or one more.
    first = split * chunks // SPLIT_K
    if SPLIT_K > 1:
        stop = tl.minimum((split + 1) * chunks // SPLIT_K * CHUNK, in_features)
    else:
        stop = in_features
    begins = tl.load(starts_ptr + rows * chunks + first, mask=row_mask, other=0).to(tl.int64)

    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + columns[None, :].to(tl.int64) * x_stride + inner[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    bits = load_bits(bitmap_ptr, rows, row_mask, first * CHUNK, row_bytes, BLOCK_K)
    for k in range(first * CHUNK, stop, BLOCK_K):
        # Values wait for their bits: those of the next step are under way by then.
        next_bits = load_bits(bitmap_ptr, rows, row_mask & (k + BLOCK_K < stop), k + BLOCK_K, row_bytes, BLOCK_K)
        weight, begins = load_set(values_ptr, begins, bits, BLOCK_M, BLOCK_K)
        x = tl.load(
            x_ptrs + k, mask=column_mask[None, :] & (inner < in_features - k)[:, None], other=0.0
        )  # [BLOCK_K, BLOCK_N]
        accumulator = tl.dot(weight, x, accumulator, input_precision="ieee")
        bits = next_bits

    release_next(PDL)
    if SPLIT_K > 1:
        store_partial(accumulator, y_ptr, split, rows, row_mask, columns, column_mask, tokens, out_features)
    else:
        store_tile(
            accumulator, bias_ptr, y_ptr, rows, row_mask, columns, column_mask, out_features, HAS_BIAS, ACTIVATION
        )


def bitmap_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    config: Config,
    chunk: int = 0,
) -> Tensor:
    """``x (tokens, in)`` with rows that may be further apart, ``values (nnz)`` and ``bitmap`` of ``formats.bitmap``,
    ``bias (out)`` -> ``(tokens, out)``, all of one dtype.

    ``starts (out, ceil(in / chunk))`` is where in ``values`` those of each ``chunk`` inputs of a row begin, and
    ``config.block_k`` divides ``chunk``; or ``starts`` is ``row_offsets (out + 1)``, and ``config.split_k`` is 1.
    """
    tokens, in_features = x.shape
    out_features, row_bytes = bitmap.shape
    y = x.new_empty(tokens, out_features)
    if not y.numel():
        return y
    split = config.split_k > 1
    target = x.new_empty((config.split_k, tokens, out_features), dtype=torch.float32) if split else y
    grid = (triton.cdiv(out_features, config.block_m), triton.cdiv(tokens, config.block_n), config.split_k)
    _bitmap_linear_kernel[grid](
        x,
        values,
        bitmap,
        starts,
        bias,
        target,
        tokens,
        in_features,
        out_features,
        x.stride(0),
        row_bytes,
        starts.shape[1] if starts.dim() == 2 else 1,
        CHUNK=chunk,
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
