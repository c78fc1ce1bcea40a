"""y = activation(t uᵀ + x Sᵀ + b) for t = x vᵀ: the products with S and with u go into the same accumulators, in one
launch.

t comes from a product before it, or from inside: a program then makes t for its own tokens beside x Sᵀ, as often as
there are tiles of features.

S is absent, has whole rows, an n:m pattern or any places. With whole rows the features are taken in another order, the
rows of S first: tiles without any of them have no S to multiply by, and y is written where its features belong.

u and v may be those of several parts of one size, one under the other (``formats.low_rank``): t then has the ranks of
all, and a tile's features are multiplied with those of the parts they are of, one part after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels.launch import await_previous, launch_options, release_next
from sparsebert.kernels.tiles import load_bitmap_tile, load_nm_tile, store_tile, tile_edges


class Config(NamedTuple):
    """BLOCK_M features by BLOCK_N tokens; a step takes BLOCK_K inputs of S, or BLOCK_R of the rank. ``inside``: the
    kernel computes t, all of it at once, so that BLOCK_R holds the rank; of several parts that of one, so that each
    tile's features must be of one."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    inside: bool
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _load_rows(ptr, rows, row_mask, first_column, columns, BLOCK_K: tl.constexpr):
    """Columns ``first_column`` to ``first_column + BLOCK_K`` of ``rows`` of a matrix with ``columns`` of them; what is
    not there is zero."""
    inner = tl.arange(0, BLOCK_K)
    return tl.load(
        ptr + rows[:, None].to(tl.int64) * columns + (first_column + inner)[None, :],
        mask=row_mask[:, None] & (inner < columns - first_column)[None, :],
        other=0.0,
    )


@triton.jit
def _add_product(
    accumulator,
    u_ptr,
    t_ptr,
    features,
    feature_mask,
    columns,
    column_mask,
    rank,
    t_stride,
    BLOCK_R: tl.constexpr,
):
    """``accumulator`` and, in the features of ``feature_mask``, t uᵀ; ``t_ptr`` is at the first of their ranks."""
    ranks = tl.arange(0, BLOCK_R)
    for r in range(0, rank, BLOCK_R):
        u = _load_rows(u_ptr, features, feature_mask, r, rank, BLOCK_R)
        t = tl.load(
            t_ptr + columns[None, :].to(tl.int64) * t_stride + (r + ranks)[:, None],
            mask=column_mask[None, :] & (ranks < rank - r)[:, None],
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        accumulator = tl.dot(u, t, accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def _low_rank_sparse_linear_kernel(
    x_ptr,
    u_ptr,
    v_ptr,
    t_ptr,
    order_ptr,
    values_ptr,
    places_ptr,
    row_offsets_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    in_features,
    out_features,
    rank,
    x_stride,
    count,
    row_bytes,
    INSIDE: tl.constexpr,
    PARTS: tl.constexpr,
    SPARSE: tl.constexpr,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous(PDL)
    rows, row_mask, columns, column_mask = tile_edges(tokens, out_features, BLOCK_M, BLOCK_N)
    features = rows
    if SPARSE == "rows":
        features = tl.load(order_ptr + rows, mask=row_mask, other=0)
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + columns[None, :].to(tl.int64) * x_stride + inner[:, None]
    ranks = tl.arange(0, BLOCK_R)
    v_rows = ranks
    if PARTS > 1:
        v_rows += tl.program_id(0) * BLOCK_M // (out_features // PARTS) * rank
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if INSIDE:
        t_sums = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)

    # How many of the inputs meet S.
    if SPARSE == "none":
        steps = 0
    elif SPARSE == "rows":
        # Only the first ``count`` features have a row in S.
        steps = tl.where(tl.program_id(0) * BLOCK_M < count, in_features, 0)
    else:
        steps = in_features
    if SPARSE != "none":
        if SPARSE == "bitmap":
            begins = tl.load(row_offsets_ptr + rows, mask=row_mask, other=0)
        for k in range(0, steps, BLOCK_K):
            if SPARSE == "nm":
                kept = in_features // GROUP * KEEP
                weight = load_nm_tile(
                    values_ptr, places_ptr, rows, row_mask, k, kept, row_bytes, KEEP, GROUP, BITS, BLOCK_M, BLOCK_K
                )
            elif SPARSE == "bitmap":
                weight, begins = load_bitmap_tile(
                    values_ptr, places_ptr, begins, rows, row_mask, k, row_bytes, BLOCK_M, BLOCK_K
                )
            else:
                weight = _load_rows(values_ptr, rows, rows < count, k, in_features, BLOCK_K)  # [BLOCK_M, BLOCK_K]
            x = tl.load(
                x_ptrs + k, mask=column_mask[None, :] & (inner < in_features - k)[:, None], other=0.0
            )  # [BLOCK_K, BLOCK_N]
            accumulator = tl.dot(weight, x, accumulator, input_precision="ieee")
            if INSIDE:
                v = _load_rows(v_ptr, v_rows, ranks < rank, k, in_features, BLOCK_K)  # [BLOCK_R, BLOCK_K]
                t_sums = tl.dot(v, x, t_sums, input_precision="ieee")
    if INSIDE and (SPARSE == "none" or SPARSE == "rows"):
        # All of the inputs or none.
        for k in range(steps, in_features, BLOCK_K):
            v = _load_rows(v_ptr, v_rows, ranks < rank, k, in_features, BLOCK_K)
            x = tl.load(x_ptrs + k, mask=column_mask[None, :] & (inner < in_features - k)[:, None], other=0.0)
            t_sums = tl.dot(v, x, t_sums, input_precision="ieee")

    if INSIDE:
        u = _load_rows(u_ptr, features, row_mask, 0, rank, BLOCK_R)  # [BLOCK_M, BLOCK_R]
        # Rounded as a product of its own would be.
        accumulator = tl.dot(u, t_sums.to(u.dtype), accumulator, input_precision="ieee")
    elif PARTS == 1:
        accumulator = _add_product(
            accumulator, u_ptr, t_ptr, features, row_mask, columns, column_mask, rank, rank, BLOCK_R
        )
    else:
        # Most tiles are of one part; those of S's rows and the last before the others may have features of all.
        parts = features // (out_features // PARTS)
        first = tl.min(tl.where(row_mask, parts, PARTS), 0)
        last = tl.max(tl.where(row_mask, parts, 0), 0)
        for part in range(first, last + 1):
            own = row_mask & (parts == part)
            added = _add_product(
                accumulator,
                u_ptr,
                t_ptr + part * rank,
                features,
                own,
                columns,
                column_mask,
                rank,
                PARTS * rank,
                BLOCK_R,
            )
            # Not by the zeros that the others' u is read as: what overflows in one part stays there.
            accumulator = tl.where(own[:, None], added, accumulator)

    release_next(PDL)
    store_tile(
        accumulator, bias_ptr, y_ptr, features, row_mask, columns, column_mask, out_features, HAS_BIAS, ACTIVATION
    )


def low_rank_sparse_linear(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    sparse: dict[str, Tensor],
    bias: Tensor | None,
    *,
    n: int = 1,
    m: int = 1,
    activation: str,
    config: Config,
) -> Tensor:
    """``x (tokens, in)`` with rows that may be further apart, ``u (out, rank)``, ``v (parts * rank, in)``,
    ``bias (out)`` -> ``(tokens, out)``, all of one dtype. One launch where ``config.inside``, else t = x vᵀ by torch
    before it.

    ``sparse``: nothing; ``order int32 (out)`` and ``values (count, in)``, the rows of the first ``count`` features of
    ``order``; ``values`` and ``positions`` of ``formats.nm``; or ``values``, ``bitmap`` and ``row_offsets`` of
    ``formats.bitmap``.
    """
    tokens, in_features = x.shape
    out_features, rank = u.shape
    y = x.new_empty(tokens, out_features)
    if not y.numel():
        return y
    kind = {"order": "rows", "positions": "nm", "bitmap": "bitmap"}
    places = sparse.get("positions", sparse.get("bitmap"))
    _low_rank_sparse_linear_kernel[(triton.cdiv(out_features, config.block_m), triton.cdiv(tokens, config.block_n))](
        x,
        u,
        v,
        None if config.inside else F.linear(x, v),
        sparse.get("order"),
        sparse.get("values"),
        places,
        sparse.get("row_offsets"),
        bias,
        y,
        tokens,
        in_features,
        out_features,
        rank,
        x.stride(0),
        len(sparse["values"]) if "order" in sparse else 0,
        0 if places is None else places.shape[1],
        INSIDE=config.inside,
        PARTS=len(v) // rank,
        SPARSE=next((kind[name] for name in sparse if name in kind), "none"),
        KEEP=n,
        GROUP=m,
        BITS=2 if m <= 4 else 4,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x),
    )
    return y
