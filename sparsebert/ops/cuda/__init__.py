"""The CUDA kernels as candidates of the ops: the layouts they read, and which problem each serves."""

from __future__ import annotations

from sparsebert.ops.cuda import mma_sp  # noqa: F401 (adds its layouts and candidates)
