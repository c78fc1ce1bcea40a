"""What a choice of kernel may know of the device it is for."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """``name`` is that of the hardware, which a measurement holds for. Of a GPU also its CUDA compute capability, its
    streaming multiprocessors, and the bytes of shared memory that a block may have."""

    type: str
    name: str = ""
    capability: tuple[int, int] | None = None
    sms: int = 0
    shared_bytes: int = 0


@lru_cache(maxsize=64)
def describe(device: torch.device) -> Device:
    """``device`` as a choice sees it. One that is no CUDA device has neither capability nor multiprocessors."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return Device(
            "cuda",
            found.name,
            (found.major, found.minor),
            found.multi_processor_count,
            found.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # not in torch's stubs
        )
    return Device(device.type, f"{device.type} {_cpu_model()}" if device.type == "cpu" else device.type)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()
