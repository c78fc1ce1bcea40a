"""``sparsebert._C``, the compiled kernels: loaded when one is first needed, and the reason where it cannot be.

Nothing else imports it. It has no torch in it: tensors go in as addresses.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from types import ModuleType
from typing import Any

from sparsebert.ops.devices import Device

_ARCH = re.compile(r"(\d+)(\d)([af]?)")


@cache
def missing() -> str | None:
    """None, or why there are no CUDA kernels in this installation."""
    try:
        load()
    except ImportError as error:
        return f"sparsebert._C is not built here ({error}); SPARSEBERT_CUDA=1 builds it at installation"
    return None


def load() -> Any:
    """The module; ``ImportError`` where there is none."""
    return importlib.import_module("sparsebert._C")


def refusal(device: Device) -> str | None:
    """None, or why no CUDA kernel runs on ``device``."""
    if device.type != "cuda" or device.capability is None:
        return f"needs a CUDA device, not {device.type}"
    if device.capability < (8, 0):
        return f"needs compute capability 8.0, found {device.capability[0]}.{device.capability[1]}"
    if reason := missing():
        return reason
    return _not_compiled_for(load(), device.capability)


@cache
def _not_compiled_for(module: ModuleType, capability: tuple[int, int]) -> str | None:
    """Machine code runs on its own major version from its minor version on; that of an ``a`` target nowhere else."""
    archs = module.build_info()["archs"]
    for arch in archs:
        if (found := _ARCH.fullmatch(arch)) is None:
            continue
        major, minor, special = int(found[1]), int(found[2]), found[3]
        if major == capability[0] and (minor == capability[1] if special == "a" else minor <= capability[1]):
            return None
    compiled = ", ".join(f"sm_{arch}" for arch in archs)
    return f"sparsebert._C is compiled for {compiled}, not for compute capability {capability[0]}.{capability[1]}"
