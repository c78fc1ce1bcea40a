"""Which layout a weight is held in on a device: what was asked for, else what was measured, else a stated default."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparsebert.ops import layouts, measurements
from sparsebert.ops.layouts import Spec

# Without a measurement: on a CPU the dense copy; on a GPU torch's 2:4 kernels where they serve, else the neutral
# tensors, which stay small.
_DEFAULTS = {"cpu": ("dense",), "cuda": ("cusparselt", "cutlass", "neutral")}


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
    return None if layout == "auto" else layouts.get(layout).supports(spec, dtype, device)


def best(spec: Spec, dtype: torch.dtype, device: torch.device) -> Choice:
    """What ``auto`` means on this device."""
    if device.type == "meta":
        return Choice("neutral", "default", "a meta tensor has no kernel")
    if (measured := measurements.fastest_layout(spec, dtype, device)) is not None:
        return Choice(measured.layout, "measured", measured.reason)
    for name in _DEFAULTS.get(device.type, ("neutral",)):
        if layouts.get(name).supports(spec, dtype, device) is None:
            return Choice(name, "default", "not measured here")
    return Choice("neutral", "default", "not measured here")
