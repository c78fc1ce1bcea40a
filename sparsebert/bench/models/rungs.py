"""Rungs of the ladder: how the weights are prepared, how the model is run, and whether rows are padded.

A rung is written as its parts, ``[way_][unpadded_|fused_]weights``:

- ways: ``eager`` (as Python runs it), ``compiled`` (torch.compile, reduce-overhead), ``compiled_max`` (max-autotune)
  and ``graph`` (a CUDA graph);
- weights: ``fp32``, ``fp16``, ``torchao_int8``, ``mixed``, or a config as the command line has it, ``2:4`` or
  ``low-rank:0.25``, with ``/layout`` where the layout held is not ``auto``.

``unpadded`` has transformers' own layers on rows without padding. ``fused`` is this package's whole way, padded rows
in and out: ``fuse_``, and ``Runner`` around it unless it is ``eager_fused``; times include packing and all that
``Runner`` does.

``unpadded_fp16`` is short for a graph, and ``torchao_int8`` alone for ``compiled_max``, without which it is no peer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsebert.configs import Config, parse_config

__all__ = ["COMPILED", "CPU", "CPU_COMPILED", "FIRST", "MORE", "Rung", "Weights", "parse_rung", "parse_weights"]

TORCHAO, MIXED = "torchao_int8", "mixed"
ATTENTION = ("query", "key", "value", "attention_output")
FEED_FORWARD = ("intermediate", "output")

PADDED, UNPADDED, FUSED = "padded", "unpadded", "fused"

# (way of running, rows) by what a name begins with; the longer ones first, since the shorter begin them.
_BEGINNINGS = {
    "compiled_max_unpadded_": ("compiled_max", UNPADDED),
    "compiled_unpadded_": ("compiled", UNPADDED),
    "eager_unpadded_": ("eager", UNPADDED),
    "eager_fused_": ("eager", FUSED),
    "unpadded_": ("graph", UNPADDED),
    "fused_": ("runner", FUSED),
    "compiled_max_": ("compiled_max", PADDED),
    "compiled_": ("compiled", PADDED),
    "eager_": ("eager", PADDED),
    "graph_": ("graph", PADDED),
}


@dataclass(frozen=True)
class Weights:
    """One way to prepare the weights. ``configs``: by role, empty for a dense model; ``layout``: that asked for."""

    name: str
    configs: tuple[tuple[str, Config], ...] = ()
    layout: str = "auto"

    @property
    def format(self) -> str | None:
        """The config, or what each role has; None for a dense model."""
        if self.name == TORCHAO:
            return "int8 (torchao)"
        roles: dict[str, list[str]] = {}
        for role, config in self.configs:
            roles.setdefault(str(config), []).append(role)
        if len(roles) <= 1:
            return next(iter(roles), None)
        return "; ".join(f"{', '.join(names)} {config}" for config, names in roles.items())

    @property
    def static(self) -> bool:
        """Whether a layer's input scale has to be measured."""
        return any(getattr(config, "activations", None) == "static" for _, config in self.configs)

    def dtype(self, device: torch.device) -> torch.dtype:
        """What the model computes in: half precision on a GPU unless it says fp32, float32 on a CPU."""
        return torch.float32 if self.name == "fp32" or device.type == "cpu" else torch.float16


@dataclass(frozen=True)
class Rung:
    """``way``: ``eager``, ``compiled``, ``compiled_max``, ``graph`` or ``runner``; ``rows``: ``padded``, ``unpadded``
    or ``fused``."""

    weights: Weights
    way: str
    rows: str = PADDED

    @property
    def name(self) -> str:
        if (self.weights.name, self.way, self.rows) == (TORCHAO, "compiled_max", PADDED):
            return TORCHAO
        parts = {parts: beginning for beginning, parts in _BEGINNINGS.items()}
        return parts[self.way, self.rows] + self.weights.name

    @property
    def unpadded(self) -> bool:
        """Whether what goes in and comes out are rows without padding."""
        return self.rows == UNPADDED

    @property
    def fused(self) -> bool:
        return self.rows == FUSED

    @property
    def execution(self) -> str:
        """``eager``, ``compiled``, ``graph`` or ``runner``."""
        return self.way.partition("_")[0]

    def refusal(self, device: torch.device) -> str | None:
        """None, or why ``device`` cannot run it, as far as that is known before it is tried."""
        if device.type != "cuda" and (self.way in ("graph", "runner") or self.weights.name == "fp16"):
            return "needs CUDA"
        return None


def parse_weights(name: str) -> Weights:
    """The weights of that name; ``ValueError`` where it is none."""
    if name in ("fp32", "fp16", TORCHAO):
        return Weights(name)
    text, _, layout = name.partition("/")
    if text == MIXED:
        parts = [(ATTENTION, parse_config("2:4")), (FEED_FORWARD, parse_config("int8+2:4"))]
    else:
        parts = [((*ATTENTION, *FEED_FORWARD), parse_config(text))]
    return Weights(name, tuple((role, config) for roles, config in parts for role in roles), layout or "auto")


def parse_rung(name: str) -> Rung:
    """The rung of that name; ``ValueError`` where it is none."""
    if name == TORCHAO:
        return Rung(Weights(TORCHAO), "compiled_max")
    for beginning, (way, rows) in _BEGINNINGS.items():
        if name.startswith(beginning):
            return Rung(parse_weights(name.removeprefix(beginning)), way, rows)
    raise ValueError(f"rung {name!r} begins with none of {', '.join(_BEGINNINGS)}")


# What a reader wants to know first; rungs of the same weights stand together.
FIRST = (
    *("graph_fp16", "eager_fp16", "unpadded_fp16", "fused_fp16"),
    *("graph_2:4", "graph_2:4/mma_sp", "fused_2:4/mma_sp"),
    *("graph_int8", "unpadded_int8", "fused_int8"),
    *("graph_int8+2:4", "graph_int8+2:4/mma_sp", "unpadded_int8+2:4/mma_sp", "fused_int8+2:4/mma_sp"),
)
MORE = (
    *("unpadded_2:4/mma_sp", "graph_mixed", "unpadded_mixed", "fused_mixed"),
    *("graph_int8-static", "fused_int8-static", "graph_2:4@0.5", "eager_fused_fp16", "fused_low-rank:0.25"),
    *("graph_low-rank:0.25", "graph_low-rank:0.05+rows:0.15", "graph_low-rank:0.05+2:4", "graph_bitmap:0.05"),
    "eager_fp32",
)
# Up to a minute each.
COMPILED = ("compiled_fp16", "compiled_max_fp16", "torchao_int8")
# A CPU has no graphs, and computes in float32.
CPU = (
    *("eager_fp32", "eager_unpadded_fp32", "eager_fused_fp32", "eager_2:4", "eager_fused_2:4"),
    *("eager_int8", "eager_unpadded_int8", "eager_fused_int8", "eager_int8+2:4", "eager_fused_low-rank:0.25"),
    *("eager_mixed", "eager_int8-static", "eager_2:4@0.5", "eager_low-rank:0.25", "eager_low-rank:0.05+rows:0.15"),
    *("eager_low-rank:0.05+2:4", "eager_bitmap:0.05"),
)
CPU_COMPILED = ("compiled_fp32", "torchao_int8")
