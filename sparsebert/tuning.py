"""``tune``: measures the layouts a device can hold, at the user's shapes, and keeps dense where packed loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.bench.timing import Timing, measure_together
from sparsebert.nn import PackedLinear
from sparsebert.ops import layouts, measurements, select
from sparsebert.ops.devices import describe
from sparsebert.report import packed_layers, table

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TunedLayer:
    """One distinct layer shape at one token count: median microseconds a call by layout (bias included)."""

    op: str
    out_features: int
    in_features: int
    dtype: str
    tokens: int
    median_us: dict[str, float]


@dataclass(frozen=True)
class TuneReport:
    """What was measured on ``device``, in which ``mode``, and the layout every layer is held in now."""

    device: str
    mode: str
    rows: tuple[TunedLayer, ...]
    held: dict[str, str]
    reasons: dict[str, str]
    table_file: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        names = sorted({name for row in self.rows for name in row.median_us})
        rows = [
            [
                f"{row.op}, {row.out_features} x {row.in_features}, {row.dtype}",
                str(row.tokens),
                *(f"{row.median_us[name]:.1f}" if name in row.median_us else "-" for name in names),
            ]
            for row in self.rows
        ]
        kept = [f"{path}: {layout}; {self.reasons[path]}" for path, layout in self.held.items()]
        return "\n".join(
            [
                f"measured on {self.device} ({self.mode}), median microseconds a call",
                table(["layer", "tokens", *names], rows),
                *kept,
                f"written to {self.table_file}",
            ]
        )

    __repr__ = __str__


@torch.no_grad()
def tune(
    model: nn.Module, tokens: Sequence[int], *, budget_s: float = 0.3, progress: Progress | None = None
) -> TuneReport:
    """Measures every layout of every distinct packed layer of ``model`` at each count of ``tokens`` on the layer's
    device, records the times in the table of measurements, and holds each layer in the layout that they favour.

    Layouts run in turns, so that a drift of the machine meets all alike; on a GPU inside CUDA graphs. ``tokens`` are
    rows of x (batch times length); a measurement counts up to the next power of two. ``dense`` is held where every
    packed layout is slower at some count by more than max(2 %, 3 MAD). ``budget_s`` bounds the time of one comparison.
    ``progress(done, total, text)`` is called before each. ``ValueError`` where nothing is packed or a count is not
    positive.
    """
    counts = sorted({measurements.token_bucket(_positive(t)) for t in tokens})
    if not counts:
        raise ValueError("tune: tokens is empty, expected at least one token count")
    layers = packed_layers(model)
    distinct = {(m.spec, m.dtype, m.device): m for _, m in layers}
    jobs = [(module, count) for module in distinct.values() for count in counts]
    results, rows, mode = [], [], ""
    for done, (module, count) in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs), f"{module.out_features} x {module.in_features}, {count} tokens")
        timings, backends = _compare(module, count, budget_s)
        mode = next(iter(timings.values())).mode
        op = measurements.op_name(module.spec)
        dtype = str(module.dtype).removeprefix("torch.")
        medians = {name: timing.median_us for name, timing in timings.items()}
        results.append(TunedLayer(op, module.out_features, module.in_features, dtype, count, medians))
        rows += [
            measurements.make_row(
                module.spec,
                name,
                count,
                module.dtype,
                module.device,
                median_us=timing.median_us,
                mad_us=timing.mad_us,
                backend=backends[name],
            )
            for name, timing in timings.items()
        ]
    file = measurements.record(rows)
    held, reasons = {}, {}
    for path, module in layers:
        module.prepare_("auto")
        fastest = measurements.fastest_layout(module.spec, module.dtype, module.device)
        held[path] = module.layout
        reasons[path] = fastest.reason if fastest else "not measured here"
    return TuneReport(describe(layers[0][1].device).name, mode, tuple(results), held, reasons, str(file))


def _compare(module: PackedLinear, tokens: int, budget_s: float) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times and backends of every layout this device can hold for ``module``, on random rows."""
    spec, dtype, device = module.spec, module.dtype, module.device
    neutral = list(module.neutral())
    x = torch.randn(tokens, spec.in_features, device=device).to(dtype)
    calls: dict[str, Callable[[], Tensor]] = {}
    backends = {}
    for name in layouts.names(spec.op):
        held = layouts.get(spec.op, name)
        if held.supports(spec, dtype, device) is not None:
            continue
        calls[name] = _call(module, name, held.from_neutral(neutral, spec, dtype), x)
        backends[name] = select.choose(select.problem_of(spec, name, x, module.activation)).backend
    return measure_together(calls, device=device, budget_s=budget_s, graph=device.type == "cuda"), backends


def _call(module: PackedLinear, layout: str, weight: list[Tensor], x: Tensor) -> Callable[[], Tensor]:
    op = getattr(torch.ops.sparsebert, module.spec.op)
    sizes = module.spec._asdict()
    return lambda: op(x, weight, module.bias, layout=layout, activation=module.activation, **sizes)


def _positive(tokens: int) -> int:
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tune: tokens holds {tokens!r}, expected positive ints")
    return tokens
