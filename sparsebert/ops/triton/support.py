"""Where the Triton kernels run at all. Triton is imported, and a kernel compiled, when one is first needed.

CPU tensors are served by Triton's interpreter alone, for tests: where TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from sparsebert.ops.select import Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_VERSION = (3, 6)


def refusal(problem: Problem) -> str | None:
    """None, or why no Triton kernel runs on this device and dtype."""
    device = problem.device
    if device.type == "cuda":
        if device.capability is not None and device.capability < (8, 0):
            return f"needs compute capability 8.0, found {device.capability[0]}.{device.capability[1]}"
    elif device.type != "cpu" or not interpreting():
        return f"needs a CUDA device, not {device.type}"
    if problem.dtype not in DTYPES:
        names = [str(dtype).removeprefix("torch.") for dtype in (*DTYPES, problem.dtype)]
        return f"needs {', '.join(names[:-1])}, not {names[-1]}"
    if device.type == "cpu" and problem.dtype == torch.bfloat16:
        return "Triton's interpreter has no bfloat16"
    return _missing()


def interpreting() -> bool:
    """Whether Triton runs kernels on CPU tensors, one program after the other."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _missing() -> str | None:
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "Triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_VERSION:
        return f"needs Triton {LEAST_VERSION[0]}.{LEAST_VERSION[1]}, found {version}"
    return None


def rows_of(x: Tensor) -> Tensor:
    """x as ``(tokens, in)``, each row without gaps."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
