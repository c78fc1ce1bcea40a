"""The Triton kernels as candidates of the ops: which problem each serves, in which configurations."""

from __future__ import annotations

from sparsebert.ops.triton import (  # noqa: F401 (add their layouts and candidates)
    bitmap,
    dense,
    embeddings,
    int8,
    layer_norm,
    low_rank,
    nm,
)
