"""Programmatic dependent launch (PDL): a kernel begins while the one ahead of it in the stream still ends.

With SPARSEBERT_PDL=1 the package's kernels are launched so on GPUs from compute capability 9.0, inside CUDA graphs too.
Each waits for the whole of the kernel ahead before it reads or writes anything, so results are the same; what overlaps
is the launch. Off until it has been measured.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

ENVIRONMENT_VARIABLE = "SPARSEBERT_PDL"
_LEAST_CAPABILITY = (9, 0)


def launch_options(x: Tensor) -> dict[str, bool]:
    """The keywords PDL of a kernel and ``launch_pdl`` of its launch, on the device of ``x``."""
    if os.environ.get(ENVIRONMENT_VARIABLE) != "1" or not x.is_cuda:
        return {"PDL": False}
    if torch.cuda.get_device_capability(x.device) < _LEAST_CAPABILITY:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Waits until the kernel ahead has ended and what it wrote is there; first of all in a kernel."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_next(PDL: tl.constexpr):
    """Lets the kernel behind begin, which then waits in turn; where only the end of a tile is left to do."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
