"""The CUDA kernels as candidates of the ops: the layouts they read, and which problem each serves."""

from __future__ import annotations

from sparsebert.ops.cuda import hopper, mma_sp  # noqa: F401 (add their layouts and candidates)
