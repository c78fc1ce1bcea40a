"""The 2:4 kernel on the sparse tensor cores (``csrc/nm24``): what it can run, in which configurations, and one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsebert.formats import mma_sp
from sparsebert.ops.cuda import calls, extension
from sparsebert.ops.cuda.calls import Place, address
from sparsebert.ops.devices import Device
from sparsebert.ops.low_rank import padded_rank
from sparsebert.ops.select import Problem
from sparsebert.ops.specs import Int8Spec, LowRankSparseSpec, Spec


class Config(NamedTuple):
    """A tile of ``csrc/nm24/problem.h`` with its sides, and the number of parts that the inputs are divided into."""

    tile: int
    features: int
    tokens: int
    splits: int


# Where it runs


def refusal(spec: Spec, dtype: torch.dtype, device: Device) -> str | None:
    """None, or why the kernel cannot take ``spec`` with x in ``dtype`` on ``device``."""
    if reason := unfit(spec, dtype):
        return reason
    return extension.refusal(device)


def unfit(spec: Spec, dtype: torch.dtype) -> str | None:
    """None, or why no device can hold a weight of ``spec`` in ``mma_sp``."""
    if isinstance(spec, LowRankSparseSpec) and spec.sparse != "nm":
        return f"needs a sparse part at n:m, not {spec.sparse}"
    if isinstance(spec, LowRankSparseSpec) and spec.parts > 1:
        return f"needs one product of factors, not {spec.parts}"
    pattern = (getattr(spec, "n", 0), getattr(spec, "m", 0))
    if pattern not in mma_sp.PATTERNS:
        return f"needs a 2:4 pattern, not {pattern[0]}:{pattern[1]}"
    if spec.in_features % 4:
        return f"needs in_features in multiples of 4, not {spec.in_features}"
    return calls.unserved(dtype, integer=isinstance(spec, Int8Spec))


@lru_cache(maxsize=1024)
def configurations(problem: Problem) -> Sequence[Config]:
    """The solutions that ``_C`` finds for the sizes of a problem."""
    spec: Any = problem.spec
    integer = isinstance(spec, Int8Spec)
    found = extension.load().nm24_solutions(
        element=calls.ELEMENTS[torch.int8 if integer else problem.dtype],
        tokens=max(1, problem.tokens),
        in_features=spec.in_features,
        out_features=spec.out_features,
        rank=padded_rank(spec.rank) if isinstance(spec, LowRankSparseSpec) else 0,
        sms=problem.device.sms,
        shared_bytes=problem.device.shared_bytes,
    )
    return tuple(Config(*one) for one in found)


# A call


def linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    *,
    in_features: int,
    out_features: int,
    activation: str = "none",
    config: Config,
    columns: Tensor | None = None,
    t: Tensor | None = None,
    u: Tensor | None = None,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    x_scale: Tensor | None = None,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    output_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """y = activation(alpha (x Wᵀ + t uᵀ) + b) + residual, ``(tokens, out)`` in ``dtype`` (that of x).

    ``x (tokens, in)`` fp16, bf16 or int8, its rows without gaps, or with ``columns int32 (in)`` ``(tokens, wider)``, of
    which those columns are taken; ``values`` and ``metadata`` of ``formats.mma_sp``; ``t (tokens, rank)`` and ``u`` of
    ``mma_sp.pack_factor``, rank a multiple of 16; ``residual (tokens, out)`` in ``dtype``. int8 x: ``x_scale fp32
    (tokens)``, ``scales fp32 (out)``, y = activation((sums x_scale) scales + b), int8 again by ``output_scale fp32
    ()``, whose scales a row go to ``y_scale fp32 (tokens)``.

    ``x`` is copied where its rows do not begin at multiples of 4 bytes. On the current stream of x's device; may be
    captured in a CUDA graph.
    """
    x = _aligned(x, columns)
    tokens = x.shape[0]
    y_dtype = torch.int8 if output_scale is not None else dtype or x.dtype
    y = x.new_empty((tokens, out_features), dtype=y_dtype)
    if not y.numel():
        return y
    c = extension.load()
    place = calls.place_of(x)
    partial, arrivals = _workspace(c, x, tokens, out_features, config, place)
    # What is made here lives until the call is launched; after that the stream's order keeps it.
    product = calls.product(
        x,
        values,
        y,
        place,
        in_features=in_features,
        rank=0 if t is None else t.shape[1],
        t=t,
        u=u,
        bias=bias,
        residual=residual,
        x_scale=x_scale,
        scales=scales,
        alpha=alpha,
    )
    c.nm24_linear(
        **product,
        tile=config.tile,
        splits=config.splits,
        metadata=metadata.data_ptr(),
        columns=address(columns),
        output_scale=address(output_scale),
        y_scale=address(y_scale),
        partial=address(partial),
        arrivals=address(arrivals),
        activation=calls.ACTIVATIONS[activation],
    )
    return y


def _aligned(x: Tensor, columns: Tensor | None) -> Tensor:
    """x, or a copy where its rows have gaps or do not begin at multiples of 4 bytes."""
    itemsize = x.element_size()
    if x.stride(-1) == 1 and (columns is not None or (x.data_ptr() % 4 == 0 and x.stride(0) * itemsize % 4 == 0)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _workspace(
    c: Any, x: Tensor, tokens: int, out_features: int, config: Config, place: Place
) -> tuple[Tensor | None, Tensor | None]:
    """Room for the partial sums of a split product, and its counters."""
    if config.splits == 1:
        return None, None
    size, count = c.nm24_workspace(tokens=tokens, out_features=out_features, tile=config.tile, splits=config.splits)
    partial = torch.empty(size, dtype=torch.uint8, device=x.device)
    if place.capturing and x.device not in _counters:
        # What is made now lies in the graph's memory: zeros for this call alone, filled in at each replay.
        return partial, torch.zeros(count, dtype=torch.int32, device=x.device)
    return partial, reserve_counters(x.device).of(place, count)


class _Counters:
    """The counters of split products on a device: zeros that every call leaves as it found them.

    Calls of a stream follow each other and share theirs. A captured graph runs on any stream at any time, so each of
    its calls has counters of its own, for good. All come from one tensor, which is made before anything is captured or
    warmed up for it: it must not lie in the memory of a graph.
    """

    SIZE = 1 << 18  # 1 MiB: some thousand calls in graphs

    def __init__(self, device: torch.device) -> None:
        self._zeros = torch.zeros(self.SIZE, dtype=torch.int32, device=device)
        self._used = 0
        self._of_stream: dict[int, Tensor] = {}

    def of(self, place: Place, count: int) -> Tensor:
        if place.capturing:
            return self._take(count)
        held = self._of_stream.get(place.stream)
        if held is None or len(held) < count:
            held = self._of_stream[place.stream] = self._take(max(count, 1024))
        return held

    def _take(self, count: int) -> Tensor:
        if self._used + count > self.SIZE:
            # Zeroed by a kernel of its own, in a graph at each replay.
            return self._zeros.new_zeros(count)
        self._used += count
        return self._zeros[self._used - count : self._used]


_counters: dict[torch.device, _Counters] = {}


def reserve_counters(device: torch.device) -> _Counters:
    """Those of ``device``, made the first time: when a weight is packed for it."""
    found = _counters.get(device)
    if found is None:
        found = _counters.setdefault(device, _Counters(device))
    return found
