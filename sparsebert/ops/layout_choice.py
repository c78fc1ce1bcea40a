"""Which layout a weight is held in on a device: what was asked for, else what was measured, else a stated default."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparsebert.ops import int8, layouts, measurements
from sparsebert.ops.specs import Spec

# Without a measurement, the first that the device can hold, by op and kind of device; else neutral, which stays small.
# n:m and bitmap weights have no arithmetic of their own on a CPU, so there it is the dense copy.
_DEFAULTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("nm_linear", "cpu"): ("dense",),
    ("nm_linear", "cuda"): ("cusparselt", "cutlass"),
    ("bitmap_linear", "cpu"): ("dense",),
    ("low_rank_sparse_linear", "cpu"): ("stacked", "dense"),
    ("low_rank_sparse_linear", "cuda"): ("stacked",),
    ("int8_linear", "cuda"): ("unpacked",),
}


class Choice(NamedTuple):
    """A layout and why: ``reason`` is a sentence, ``source`` is ``measured`` or ``default``."""

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
    for name in _defaults(spec, device):
        if layouts.get(spec.op, name).supports(spec, dtype, device) is None:
            return Choice(name, "default", "not measured here")
    return Choice("neutral", "default", "not measured here")


def _defaults(spec: Spec, device: torch.device) -> tuple[str, ...]:
    if (spec.op, device.type) == ("int8_linear", "cpu"):
        return ("unpacked",) if int8.cpu_has_int8() else ("float",)
    return _DEFAULTS.get((spec.op, device.type), ())
