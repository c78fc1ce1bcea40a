"""``tune``: measures layouts, kernels and their configurations at the user's shapes, and keeps dense where packed
loses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sparsebert import ops
from sparsebert.bench.timing import Timing, l2_bytes, measure_together, rotation_count
from sparsebert.nn import Int8Linear, PackedLinear
from sparsebert.nn.fused_encoder_layer import Normalized, Weight, held_by, normalized
from sparsebert.ops import layouts, linear_layer_norm, measurements, select
from sparsebert.ops.devices import describe
from sparsebert.ops.linear_layer_norm import APART, Call, run_apart, run_fused
from sparsebert.ops.select import Solution
from sparsebert.ops.specs import AddLayerNormSpec
from sparsebert.report import packed_layers, table

Progress = Callable[[int, int, str], None]
# The same call on each copy of a weight.
Calls = Sequence[Callable[[], Any]]
K = TypeVar("K")


@dataclass(frozen=True)
class TunedLayer:
    """One distinct layer shape at one token count: by layout the median microseconds a call (bias included), and the
    kernel they are of. Of a fused encoder's linear with the normalization after it, ``op`` is that of both, and the
    times are those of two kernels, ``apart``, and of one, ``fused``."""

    op: str
    out_features: int
    in_features: int
    dtype: str
    tokens: int
    median_us: dict[str, float]
    kernels: dict[str, str]


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

    Of a layout the quickest kernel counts, in the quickest of the configurations that fit the device; both are recorded
    and used from then on. A kernel that waited for this is compared with the reference first, and left out with a
    warning where it is wrong. Calls run in turns, so that a drift of the machine meets all alike; on a GPU inside CUDA
    graphs and on copies of the weight that together exceed its L2 cache, so that each comes from memory. What is timed
    is kernels, without the dispatch of an op. ``tokens`` are rows of x (batch times length); a measurement counts up to
    the next power of two. ``dense`` is held where every packed layout is slower at some count by more than max(2 %, 3
    MAD). ``budget_s`` bounds the time of one comparison: one a kernel with configurations, one of the layouts.
    ``progress(done, total, text)`` is called before each layer and count. ``ValueError`` where nothing is packed or a
    count is not positive, ``RuntimeError`` while a CUDA graph is captured.
    """
    counts = sorted({measurements.token_bucket(_positive(t)) for t in tokens})
    if not counts:
        raise ValueError("tune: tokens is empty, expected at least one token count")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: a CUDA graph is being captured; tune before capturing")
    layers = packed_layers(model)
    distinct = {(m.spec, m.dtype, m.device): m for _, m in layers}
    jobs = [(module, count) for module in distinct.values() for count in counts]
    results, rows, mode = [], [], ""
    for done, (module, count) in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs), f"{module.out_features} x {module.in_features}, {count} tokens")
        found = _compare(module, count, budget_s)
        mode = next(iter(found.values())).timing.mode
        results.append(
            TunedLayer(
                measurements.op_name(module.spec),
                module.out_features,
                module.in_features,
                str(module.dtype).removeprefix("torch."),
                count,
                {name: measured.timing.median_us for name, measured in found.items()},
                {name: f"{m.solution.backend}: {m.solution.description}" for name, m in found.items()},
            )
        )
        for name, (solution, timing) in found.items():
            problem = module.problem(count)._replace(layout=name)
            rows.append(_row(problem, count, module.device, timing, solution.backend, solution.configuration))
    file = measurements.record(rows)
    held, reasons = {}, {}
    for path, module in layers:
        module.prepare_("auto")
        fastest = measurements.fastest_layout(module.spec, module.dtype, module.device)
        held[path] = module.layout
        reasons[path] = fastest.reason if fastest else "not measured here"
    done, report = len(jobs), progress or (lambda *_: None)
    fused = _compare_fused(model, counts, budget_s, lambda i, total, text: report(done + i, done + total, text))
    if fused:
        measurements.record([row for _, row in fused])
        results += [layer for layer, _ in fused]
    return TuneReport(describe(layers[0][1].device).name, mode, tuple(results), held, reasons, str(file))


class _Measured(NamedTuple):
    solution: Solution
    timing: Timing


def _compare(module: PackedLinear, tokens: int, budget_s: float) -> dict[str, _Measured]:
    """Of every layout this device can hold for ``module`` the quickest kernel in its quickest configuration, on random
    rows. One that waits for this has to have the reference's result first."""
    spec, dtype, device = module.spec, module.dtype, module.device
    neutral = list(module.neutral())
    x = torch.randn(tokens, spec.in_features, device=device).to(dtype)
    expected = _reference(neutral, module.bias, select.problem_of(spec, layouts.NEUTRAL, x, module.activation), x)
    finalists: dict[tuple[str, str], Solution] = {}
    calls: dict[tuple[str, str], Calls] = {}
    for name in layouts.names(spec.op):
        held = layouts.get(spec.op, name)
        if held.supports(spec, dtype, device) is not None:
            continue
        problem = select.problem_of(spec, name, x, module.activation)
        copies = _copies(held.from_neutral(neutral, spec, dtype), device)
        only = select.forced_backend() or ("reference" if _calls_linear(module, name) else None)
        for candidate, refused in select.review(problem):
            if refused is not None or (only or candidate.backend) != candidate.backend:
                continue
            found: dict[Solution, Sequence[Callable[[], Tensor]]] = {
                solution._replace(source="measured"): [
                    partial(solution.run, x, weight, module.bias, problem) for weight in copies
                ]
                for solution in select.solutions(candidate, problem)
                if candidate.waits is None
                or _is_right(solution.run(x, copies[0], module.bias, problem), expected, solution, problem)
            }
            if not found:
                continue
            best = next(iter(found)) if len(found) == 1 else _quickest(_measure(found, device, budget_s))
            finalists[name, candidate.backend] = best
            calls[name, candidate.backend] = found[best]
    timings = _measure(calls, device, budget_s)
    measured = {}
    for name in dict.fromkeys(layout for layout, _ in calls):
        key = _quickest({key: timing for key, timing in timings.items() if key[0] == name})
        measured[name] = _Measured(finalists[key], timings[key])
    return measured


def _compare_fused(
    model: nn.Module, counts: Sequence[int], budget_s: float, progress: Callable[[int, int, str], None]
) -> list[tuple[TunedLayer, measurements.Row]]:
    """At each count each distinct linear layer that one kernel could run with the normalization after it: by that
    kernel, and by two. ``progress(done, total, text)`` counts these alone."""
    distinct: dict[Any, tuple[Normalized, Weight]] = {}
    for layer in normalized(model):
        parameter, weight = layer.norm.weight, held_by(layer.linear)
        if weight is not None and linear_layer_norm.fusable(
            weight.spec, weight.layout, parameter, quantize=layer.quantize
        ):
            spec = AddLayerNormSpec(weight.spec, layer.quantize)
            distinct[spec.op, spec, weight.layout, parameter.dtype, parameter.device] = layer, weight
    jobs = [(*job, count) for job in distinct.values() for count in counts]
    found = []
    for done, (layer, weight, count) in enumerate(jobs):
        progress(
            done, len(jobs), f"{weight.spec.out_features} x {weight.spec.in_features} and LayerNorm, {count} tokens"
        )
        if (measured := _fused_and_apart(layer, weight, count, budget_s)) is not None:
            found.append(measured)
    return found


def _fused_and_apart(
    layer: Normalized, weight: Weight, tokens: int, budget_s: float
) -> tuple[TunedLayer, measurements.Row] | None:
    """None where no one kernel is right."""
    parameter = layer.norm.weight
    device, dtype = parameter.device, parameter.dtype
    x, residual = (
        torch.randn(tokens, count, device=device).to(dtype)
        for count in (weight.spec.in_features, weight.spec.out_features)
    )
    given: tuple[Tensor, Tensor | None] = (x, None)
    if isinstance(layer.linear, Int8Linear):
        given = ops.quantize_rows(x, layer.linear.static_scale)
    norm = (parameter, layer.norm.bias, layer.norm.eps)
    calls = [
        Call(*given, tensors, layer.linear.bias, residual, *norm, layer.scale)
        for tensors in _copies(weight.tensors, device)
    ]
    problem = linear_layer_norm.problem_of(weight.spec, weight.layout, residual, quantize=layer.quantize)
    expected = run_apart(calls[0], problem)[0]
    # Two kernels have no solution of their own.
    runs: dict[Solution | None, Calls] = {None: [partial(run_apart, call, problem) for call in calls]}
    for candidate in linear_layer_norm.candidates(problem):
        for solution in select.solutions(candidate, problem):
            if _is_right(run_fused(solution, calls[0], problem)[0], expected, solution, problem):
                measured = solution._replace(source="measured")
                runs[measured] = [partial(run_fused, solution, call, problem) for call in calls]
    if len(runs) == 1:
        return None
    timings = _measure(runs, device, budget_s)
    apart = timings[None]
    best = min((solution for solution in timings if solution is not None), key=lambda s: timings[s].median_us)
    tuned = TunedLayer(
        measurements.op_name(problem.spec),
        problem.out_features,
        problem.in_features,
        str(dtype).removeprefix("torch."),
        tokens,
        {APART: apart.median_us, "fused": timings[best].median_us},
        {APART: "two kernels", "fused": f"{best.backend}: {best.description}"},
    )
    if timings[best].median_us < apart.median_us:
        return tuned, _row(problem, tokens, device, timings[best], best.backend, best.configuration)
    return tuned, _row(problem, tokens, device, apart, APART, None)


# Of the result's norm. What is wrong is wrong by a tenth and more; int8 rounds a few numbers the other way.
_AGREEMENT = 0.02


def _reference(weight: list[Tensor], bias: Tensor | None, problem: select.Problem, x: Tensor) -> Tensor:
    (candidate,) = (c for c in select.candidates(problem.op, problem.layout) if c.backend == "reference")
    return candidate.run(x, weight, bias, problem)


def _is_right(found: Tensor, expected: Tensor, solution: Solution, problem: select.Problem) -> bool:
    """Whether a kernel computed what it should have; else it is left out, with a warning."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    if error <= _AGREEMENT:
        return True
    warnings.warn(
        f"tune: {problem.op} in layout {problem.layout!r} by {solution.backend} ({solution.description}) is wrong on "
        f"this device, by {error:.2g} of the result: it is not used; please report it",
        RuntimeWarning,
        stacklevel=4,
    )
    return False


def _calls_linear(module: PackedLinear, layout: str) -> bool:
    """Whether the module calls torch's linear itself in this layout, past any other kernel that would serve it."""
    return layout in module.plain_layouts and not (module.fuses_activations and module.activation != "none")


def _copies(weight: list[Tensor], device: torch.device) -> list[list[Tensor]]:
    """``weight`` and as many copies of it as exceed the cache, where the device has one that is measured around."""
    size = sum(tensor.nbytes for tensor in weight)
    count = rotation_count(max(1, size), l2_bytes(device))
    return [weight, *([tensor.clone() for tensor in weight] for _ in range(count - 1))]


def _measure(calls: Mapping[K, Calls], device: torch.device, budget_s: float) -> dict[K, Timing]:
    names = {str(i): call for i, call in enumerate(calls.values())}
    timings = measure_together(names, device=device, budget_s=budget_s, graph=device.type == "cuda")
    return dict(zip(calls, timings.values(), strict=True))


def _quickest(timings: Mapping[K, Timing]) -> K:
    return min(timings, key=lambda key: timings[key].median_us)


def _row(
    problem: select.Problem, tokens: int, device: torch.device, timing: Timing, backend: str, configuration: Any
) -> measurements.Row:
    return measurements.make_row(
        problem.spec,
        problem.layout,
        tokens,
        problem.dtype,
        device,
        median_us=timing.median_us,
        mad_us=timing.mad_us,
        backend=backend,
        configuration={} if configuration is None else configuration._asdict(),
    )


def _positive(tokens: int) -> int:
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tune: tokens holds {tokens!r}, expected positive ints")
    return tokens
