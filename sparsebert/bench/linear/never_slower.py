"""The promise, measured: what ``sb.tune`` holds is not slower than the best dense path, or stays dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsebert as sb
from sparsebert.bench import timing
from sparsebert.bench.jobs import Job
from sparsebert.bench.linear import own, shapes
from sparsebert.bench.linear.shapes import DRY_CACHE, Shape
from sparsebert.nn import PackedLinear
from sparsebert.ops import measurements, select

FORMATS = ("2:4", "int8", "int8+2:4", "low-rank:0.25", "low-rank:0.05+rows:0.15", "bitmap:0.05")
TOKENS = (128, 2048)


def jobs(
    device: torch.device,
    *,
    models: Sequence[str] = ("large", "base"),
    formats: Sequence[str] = FORMATS,
    tokens: Sequence[int] = TOKENS,
    compiled: bool = False,
    dry: bool = False,
    budget_s: float = 0.3,
) -> list[Job]:
    """A job for each format, layer and token count: the layer is tuned (``sb.tune`` at all of ``tokens``) and then
    timed, in turns with the dense paths, in graph replay with its weights out of the cache.

    The dense paths are torch's linear and, ``compiled``, what ``torch.compile`` makes of it with max-autotune. A row's
    status is ``failed`` where the layer takes longer than the quicker of them by more than ``margin_us``, the larger of
    2 % and 3 MAD; ``ratio`` is its time over theirs. ``sb.tune`` writes to the table of measurements, so
    ``SPARSEBERT_CACHE`` should name a folder of its own.
    """
    where = shapes.DRY_SHAPES if dry else shapes.of(*models)
    counts = shapes.DRY_TOKENS if dry else tuple(tokens)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    tuned = lru_cache(maxsize=1)(partial(_tuned, device=device, dtype=dtype, tokens=counts, budget_s=budget_s))
    return [
        Job(
            f"never slower {shape.role} T={count} {format}",
            {
                "kind": "never_slower",
                "peer": format,
                "format": format,
                "model": shape.model,
                "role": shape.role,
                "out_features": shape.out_features,
                "in_features": shape.in_features,
                "tokens": count,
                "dtype": str(dtype).removeprefix("torch."),
            },
            partial(_compare, tuned, format, shape, count, compiled, budget_s, dry),
        )
        for format in formats
        for shape in where
        for count in counts
    ]


def _tuned(
    format: str, shape: Shape, *, device: torch.device, dtype: torch.dtype, tokens: Sequence[int], budget_s: float
) -> PackedLinear:
    # A copy: tuning holds the layer in another layout.
    model = nn.Sequential(deepcopy(own.layer(format, shape.out_features, shape.in_features, dtype, device)))
    sb.tune(model, list(tokens), budget_s=budget_s)
    found: Any = model[0]
    return found


@torch.no_grad()
def _compare(
    tuned: Callable[[str, Shape], PackedLinear],
    format: str,
    shape: Shape,
    tokens: int,
    compiled: bool,
    budget_s: float,
    dry: bool,
) -> dict[str, Any]:
    module = tuned(format, shape)
    device, dtype = module.device, module.dtype
    on_gpu = device.type == "cuda"
    cache = DRY_CACHE if dry else timing.l2_bytes(device)
    x = torch.randn(tokens, shape.in_features, device=device).to(dtype)
    dense = module.to_linear()

    def rotated(layer: nn.Module, nbytes: int) -> list[nn.Module]:
        return [layer, *(deepcopy(layer) for _ in range(timing.rotation_count(nbytes, cache) - 1))]

    paths: dict[str, list[Callable[[], Tensor]]] = {
        "tuned": [partial(layer, x) for layer in rotated(module, module.memory_bytes())],
        "linear": [partial(layer, x) for layer in rotated(dense, module.dense_bytes())],
    }
    if compiled:
        torch.compiler.reset()
        linear: Any = torch.compile(F.linear, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs")
        copies: list[Any] = rotated(dense, module.dense_bytes())
        paths["compiled"] = [partial(linear, x, layer.weight, layer.bias) for layer in copies]
    times = timing.measure_together(paths, device=device, budget_s=budget_s, graph=on_gpu)
    own_time = times.pop("tuned")
    best = min(times, key=lambda name: times[name].median_us)
    solution = select.choose(module.problem(tokens))
    judged = verdict(own_time, times[best])
    if dry:
        judged |= {"status": "skipped", "reason": "DRY: these times mean nothing"}
    return {
        **judged,
        **own_time.to_dict(),
        "layout": module.layout,
        "backend": solution.backend,
        "kernel": solution.description,
        "dense_peer": best,
        "dense_us": times[best].median_us,
        "dense_mad_us": times[best].mad_us,
    }


def verdict(own_time: timing.Timing, dense: timing.Timing) -> dict[str, Any]:
    """``status``, ``ratio`` and ``margin_us`` of a layer's time and that of the best dense path of the same run."""
    margin = measurements.margin_us(dense.median_us, dense.mad_us)
    slower = own_time.median_us - dense.median_us
    result = {"status": "ok", "ratio": own_time.median_us / dense.median_us, "margin_us": margin}
    if slower > margin:
        reason = f"slower than dense by {slower:.3g} us, expected at most {margin:.3g}"
        result |= {"status": "failed", "reason": reason}
    return result
