"""The package's torch ops: schema, fake and reference first, faster backends of the same op beside them.

``register()`` runs at ``import sparsebert`` so that ``torch.export.load`` finds the ops; it touches torch alone.
"""

from __future__ import annotations

from functools import cache

import torch

from sparsebert.ops import (  # noqa: F401 (add layouts, candidates)
    attention,
    cuda,
    embeddings,
    layer_norm,
    linear,
    linear_layer_norm,
    quantized,
    specs,
    torch_sparse,
    triton,
)
from sparsebert.ops.attention import varlen_attention
from sparsebert.ops.bitmap import bitmap_linear
from sparsebert.ops.dense import dense_linear
from sparsebert.ops.embeddings import embed_layer_norm
from sparsebert.ops.int8 import int8_linear
from sparsebert.ops.layer_norm import add_layer_norm, add_layer_norm_quantize
from sparsebert.ops.low_rank import low_rank_linear
from sparsebert.ops.low_rank_sparse import low_rank_sparse_linear
from sparsebert.ops.nm import nm_linear
from sparsebert.ops.quantized import int8_linear_from_int8, int8_linear_to_int8, quantize_rows

__all__ = [
    "add_layer_norm",
    "add_layer_norm_quantize",
    "bitmap_linear",
    "dense_linear",
    "embed_layer_norm",
    "int8_linear",
    "int8_linear_from_int8",
    "int8_linear_to_int8",
    "low_rank_linear",
    "low_rank_sparse_linear",
    "nm_linear",
    "quantize_rows",
    "register",
    "varlen_attention",
]


@cache
def register() -> torch.library.Library:
    """Defines the ops with their fakes, gradients and autocast rules; once a process."""
    library = torch.library.Library("sparsebert", "DEF")
    for op, spec_type in specs.SPECS.items():
        linear.define(library, op, spec_type)
    quantized.define(library)
    attention.define(library)
    layer_norm.define(library)
    linear_layer_norm.define(library)
    embeddings.define(library)
    # The library lives as long as this reference to it: the cache of this function keeps it.
    return library
