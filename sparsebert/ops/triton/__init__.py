"""The Triton kernels as candidates of the ops: which problem each serves, in which configurations."""

from __future__ import annotations

from sparsebert.ops.triton import bitmap, int8, low_rank, nm  # noqa: F401 (add their layouts and candidates)
