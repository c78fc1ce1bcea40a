"""Sums of rows of tables, normalized: LayerNorm(words[input_ids] + token_types[token_type_ids] +
positions[position_ids])."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsebert.kernels.launch import await_previous, release_next
from sparsebert.kernels.layer_norm import normalize, row_options


@triton.jit
def _load_embedding(ids_ptr, table_ptr, token, entries, stride, columns, mask):
    """A row of a table as float32 [BLOCK], NaN where there is none: an id that is out of range reads nothing."""
    entry = tl.load(ids_ptr + token).to(tl.int64)
    exists = (entry >= 0) & (entry < entries)
    row = tl.load(table_ptr + entry * stride + columns, mask=mask & exists, other=0.0).to(tl.float32)
    return tl.where(exists, row, float("nan"))


@triton.jit
def _embed_layer_norm_kernel(
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    words_ptr,
    positions_ptr,
    token_types_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    word_entries,
    position_entries,
    token_type_entries,
    words_stride,
    positions_stride,
    token_types_stride,
    features,
    eps,
    HAS_TOKEN_TYPES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < features
    x = _load_embedding(input_ids_ptr, words_ptr, token, word_entries, words_stride, columns, mask)
    if HAS_TOKEN_TYPES:
        x += _load_embedding(
            token_type_ids_ptr, token_types_ptr, token, token_type_entries, token_types_stride, columns, mask
        )
    x += _load_embedding(position_ids_ptr, positions_ptr, token, position_entries, positions_stride, columns, mask)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    y = normalize(x, mask, weight, bias, features, eps)
    release_next(PDL)
    tl.store(y_ptr + token * features + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    words: Tensor,
    positions: Tensor,
    token_types: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """Ids int64 or int32 ``(tokens)`` and tables ``(entries, features)`` with rows that may be further apart -> ``y
    (tokens, features)`` in their dtype, by ``weight`` and ``bias (features)`` of any float dtype. A token with an id
    that its table lacks is NaN. A program holds a row."""
    tokens, features = len(input_ids), words.shape[1]
    y = words.new_empty((tokens, features))
    if not tokens:
        return y
    block = triton.next_power_of_2(features)
    _embed_layer_norm_kernel[(tokens,)](
        input_ids,
        position_ids,
        token_type_ids,
        words,
        positions,
        token_types,
        weight,
        bias,
        y,
        len(words),
        len(positions),
        0 if token_types is None else len(token_types),
        words.stride(0),
        positions.stride(0),
        0 if token_types is None else token_types.stride(0),
        features,
        eps,
        HAS_TOKEN_TYPES=token_types is not None,
        BLOCK=block,
        **row_options(words, block),
    )
    return y
