"""Which layout a weight is held in on a device: what was asked for, else what was measured, else a stated default."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparsebert.ops import int8, layouts, measurements
from sparsebert.ops.specs import Int8Spec, Spec

# Without a measurement, the first that the device can hold, by op and kind of device; else neutral, which stays small.
# n:m and bitmap weights have no arithmetic of their own on a CPU, so there it is the dense copy.
_DEFAULTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("nm_linear", "cpu"): ("dense",),
    ("nm_linear", "cuda"): ("cusparselt", "cutlass"),
    ("bitmap_linear", "cpu"): ("dense",),
    ("bitmap_linear", "cuda"): ("chunked",),
    ("low_rank_linear", "cuda"): ("padded",),
    ("low_rank_sparse_linear", "cpu"): ("stacked", "dense"),
    ("low_rank_sparse_linear", "cuda"): ("grouped", "padded", "stacked"),
    ("int8_linear", "cpu"): ("unpacked",),
    ("int8_linear", "cuda"): ("unpacked",),
}
_NOT_MEASURED = "not measured here"
_NO_INT8 = (
    f"{_NOT_MEASURED}; this CPU has no int8 instructions, and exact int8 sums take longer there than a dense matmul; "
    f"x is then not quantized"
)


class Choice(NamedTuple):
    """A layout and why: ``reason`` is a sentence, ``source`` is ``measured`` (here or as shipped: the reason says
    which) or ``default``."""

    layout: str
    source: str
    reason: str


def resolve(layout: str, spec: Spec, dtype: torch.dtype, device: torch.device) -> str:
    """The layout to hold for the request ``layout`` (a name or ``auto``); ``ValueError`` where the device cannot."""
    if layout == "auto":
        return best(spec, dtype, device).layout
    if reason := refusal(layout, spec, dtype, device):
        raise ValueError(
            f"layout {layout!r} is not possible for {spec.out_features} x {spec.in_features} here: {reason}"
        )
    return layout


def refusal(layout: str, spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
    """None, or why ``device`` cannot hold ``layout``; ``auto`` is always possible."""
    return None if layout == "auto" else layouts.get(spec.op, layout).supports(spec, dtype, device)


def best(spec: Spec, dtype: torch.dtype, device: torch.device) -> Choice:
    """What ``auto`` means on this device."""
    if device.type == "meta":
        return Choice("neutral", "default", "a meta tensor has no kernel")
    if (measured := measurements.fastest_layout(spec, dtype, device)) is not None:
        return Choice(measured.layout, "measured", measured.reason)
    if spec.op == int8.OP and _without_int8(device):
        return Choice("dense", "default", _NO_INT8)
    return Choice(_default(spec, dtype, device), "default", _NOT_MEASURED)


def quantizing(spec: Int8Spec, dtype: torch.dtype, device: torch.device) -> str:
    """The layout of an int8 weight that is best for computing what a device with int8 instructions does, x quantized,
    where this one may have none."""
    return int8.FLOATS if _without_int8(device) else _default(spec, dtype, device)


def _default(spec: Spec, dtype: torch.dtype, device: torch.device) -> str:
    for name in _DEFAULTS.get((spec.op, device.type), ()):
        if layouts.get(spec.op, name).supports(spec, dtype, device) is None:
            return name
    return "neutral"


def _without_int8(device: torch.device) -> bool:
    return device.type == "cpu" and not int8.cpu_has_int8()
