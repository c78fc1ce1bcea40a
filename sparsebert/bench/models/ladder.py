"""The model ladder: every rung on every batch, compared with its reference before it is timed.

A row of kind ``model`` is comparable with any other of the same ``model``, ``batch``, ``length`` and ``lengths``. Known
beforehand: ``peer``, the rung; ``tokens``, the real ones, and ``padded_tokens``, the rows that are computed;
``format``, None where dense; ``flops`` of the dense model on the real tokens, whatever is skipped or padded.

Measured: ``layouts``, how many packed layers are held in which, and ``kernels``, how many each backend runs;
``model_bytes`` and ``encoder_bytes`` in memory, the latter of the encoder's linear layers, and ``disk_bytes``;
``error`` and ``error_limit`` (see ``prepared.Prepared``) against ``reference``; ``first_call_s``, which holds the
compilation; the times of single calls; ``sequences_per_s`` and ``tokens_per_s``, of real tokens; ``peak_bytes`` of
device memory while the times were taken, the weights included; ``anchor_us`` of a dense model that ran in turns with
it (``anchor`` says how); ``matmul_precision`` where float32 is computed with: ``highest`` is torch's default, no TF32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sparsebert as sb
from sparsebert.bench import timing
from sparsebert.bench.jobs import Job
from sparsebert.bench.linear.cases import SHORT, relative_error
from sparsebert.bench.models import rungs as ladder
from sparsebert.bench.models import unpadded
from sparsebert.bench.models.encoders import SIZES, Size, flops
from sparsebert.bench.models.inputs import DISTRIBUTIONS, FULL, Batch, draw_lengths, make_batch
from sparsebert.bench.models.prepared import Models, Prepared, has_torchao, held_layouts
from sparsebert.bench.models.rungs import TORCHAO, Rung, parse_rung

__all__ = ["BATCHES", "LENGTHS", "Cell", "jobs"]

BATCHES = (8, 1, 32, 128)
LENGTHS = (128, 384)
# The cells that are measured before all others: one alone, so that its rows can be compared early, then two more.
FOREMOST = ((8, 128),), ((1, 128), (32, 128))
DRY_CELL = (3, 16)
# Blocks of the size of an output that are spoilt: other tensors of a model are as large and may take the first.
SPOILT = 8
# What torchao asks of the compiler, here for this model alone.
TORCHAO_OPTIONS = {"coordinate_descent_check_all_directions": True, "force_fuse_int_mm_with_mul": True}

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model on one batch: ``lengths`` is ``full``, ``glue`` or ``squad``."""

    size: Size
    batch: int
    length: int
    lengths: str

    @property
    def counts(self) -> tuple[int, ...]:
        """Real tokens of each row."""
        return draw_lengths(self.lengths, self.batch, self.length)

    def tokens(self, device: torch.device) -> Batch:
        return make_batch(self.counts, self.length, self.size.vocabulary, device)


def jobs(
    device: torch.device | str,
    *,
    models: Sequence[str] = ("base", "large"),
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS,
    rungs: Sequence[str] | None = None,
    compiled: bool = True,
    dry: bool = False,
    budget_s: float = 0.8,
) -> list[Job]:
    """The work list, most telling first: a few rungs of the first model on 8, 1 and 32 rows of 128 tokens, then of the
    others, then the other batches, the other rungs, and last the compiled ones.

    ``models`` are names of ``encoders.SIZES``; every batch x length comes with full rows and with rows as long as those
    of a task (``inputs``: GLUE up to 128 tokens, SQuAD above), unpadded rungs with the latter alone, fused ones with
    both. ``rungs``: names (see the module ``rungs``) instead of the device's own; ``compiled=False`` leaves out those
    through torch.compile.
    ``budget_s`` is spent on the times of one row. ``dry`` walks every rung of a GPU on a toy model, whatever the device
    and the sizes asked for. ``ValueError`` for a name that is none.

    At most one model is held at a time, and a dense one beside it. It is that of the last job, so the jobs of one list
    run one after the other.
    """
    device = torch.device(device)
    if unknown := [name for name in models if name not in SIZES]:
        raise ValueError(f"models: {unknown[0]!r} is unknown, expected some of {', '.join(SIZES)}")
    if dry:
        device, models, budget_s = torch.device("cpu"), ("toy",), min(budget_s, 0.005)
        batches, lengths = DRY_CELL[:1], DRY_CELL[1:]
    first: Sequence[str]
    more: Sequence[str]
    if rungs is not None:
        first, more = rungs, ()
    elif dry or device.type == "cuda":
        first, more = ladder.FIRST, (*ladder.MORE, *ladder.COMPILED)
    else:
        first, more = ladder.CPU, ladder.CPU_COMPILED
    asked = [[parse_rung(name) for name in names] for names in (first, more)]
    plain = [[rung for rung in those if rung.execution != "compiled"] for those in asked]
    slow = [rung for those in asked for rung in those if rung.execution == "compiled" and compiled]
    models_at_work = Models(device)
    found: dict[str, Job] = {}
    for sizes, shapes, those in _stages(models, batches, lengths, (*plain, slow)):
        for cell, rung in _in_order(sizes, shapes, those):
            job = _job(models_at_work, cell, rung, dry=dry, budget_s=budget_s)
            found.setdefault(job.key, job)
    return list(found.values())


Shapes = Sequence[tuple[int, int]]


def _stages(
    models: Sequence[str], batches: Sequence[int], lengths: Sequence[int], rungs: Sequence[Sequence[Rung]]
) -> Iterator[tuple[list[Size], Shapes, Sequence[Rung]]]:
    """(sizes, batch x length, rungs) of each stage; what comes again in a later one is not measured again."""
    sizes = [SIZES[name] for name in models]
    every = [(batch, length) for length in lengths for batch in batches]
    first, more, compiled = rungs
    foremost = [[shape for shape in shapes if shape in every] for shapes in FOREMOST]
    for size in sizes:
        for shapes in foremost:
            yield [size], shapes, first
    for size in sizes:
        for shapes in foremost:
            yield [size], shapes, more
    for those in (first, more):
        for size in sizes:
            yield [size], every, those
    for shapes in (*foremost, every):
        yield sizes, shapes, compiled


def _in_order(sizes: Sequence[Size], shapes: Shapes, rungs: Sequence[Rung]) -> Iterator[tuple[Cell, Rung]]:
    """The jobs of one stage, those of the same weights in a row, since only one model is held."""
    for size in sizes:
        for weights in dict.fromkeys(rung.weights for rung in rungs):
            for batch, length in shapes:
                for kind in (FULL, _task(length)):
                    for rung in rungs:
                        # Full rows have nothing to leave out.
                        if rung.weights == weights and not (rung.unpadded and kind == FULL):
                            yield Cell(size, batch, length, kind), rung


def _task(length: int) -> str:
    return next((name for name, shape in DISTRIBUTIONS.items() if length <= shape.longest), "squad")


def _job(models: Models, cell: Cell, rung: Rung, *, dry: bool, budget_s: float) -> Job:
    counts, device = cell.counts, models.device
    row = {
        "kind": "model",
        "peer": rung.name,
        "model": cell.size.name,
        "batch": cell.batch,
        "length": cell.length,
        "lengths": cell.lengths,
        "tokens": sum(counts),
        "padded_tokens": cell.batch * cell.length if rung.rows == ladder.PADDED else sum(counts),
        "dtype": str(rung.weights.dtype(device)).removeprefix("torch."),
        "attention": "sdpa" if rung.rows == ladder.PADDED else unpadded.describe(device),
        "format": rung.weights.format,
        "execution": rung.execution,
        "unpadded": rung.rows != ladder.PADDED,
        "flops": flops(cell.size, counts),
    }
    key = f"{cell.size.name} {cell.batch}x{cell.length} {cell.lengths} {rung.name}"
    return Job(key, row, partial(_work, models, cell, rung, dry=dry, budget_s=budget_s))


@torch.no_grad()
def _work(models: Models, cell: Cell, rung: Rung, *, dry: bool, budget_s: float) -> Row:
    """The measured fields of one row."""
    weights, device = rung.weights, models.device
    refusal = rung.refusal(device)
    if dry:
        if weights.name == TORCHAO and not has_torchao():
            return {"status": "skipped", "reason": "dry run: torchao is not installed"}
        if weights.layout != "auto":
            # That of a kernel: what this device can hold stands in for it.
            weights = replace(weights, layout="neutral")
    elif refusal:
        raise RuntimeError(refusal)
    prepared = models.get(cell.size, weights)
    batch = cell.tokens(device)
    if rung.fused:
        sb.fuse_(prepared.model)
    try:
        call = _call(prepared, batch, rung, dry=dry)
        rows = batch.ids.numel() if rung.rows == ladder.PADDED else sum(batch.lengths)
        found = {
            **prepared.sizes,
            "layouts": held_layouts(prepared.model),
            "kernels": prepared.kernels(rows),
            **_judge(prepared, batch, rung, call),
        }
        if not found["error"] <= prepared.limit:
            reason = f"error {found['error']:.3g} is over the limit {prepared.limit:.3g}"
            return {"status": "wrong", "reason": reason, **found}
        if dry and rung.way in ("graph", "runner"):
            reason = f"dry run: {refusal}; computed and compared, not timed"
            return {"status": "skipped", "reason": reason, **found}
        return {**found, **_times(prepared, batch, rung, call, budget_s)}
    finally:
        if rung.fused:
            sb.unfuse_(prepared.model)
        if rung.execution == "compiled":
            # What was compiled holds the model.
            torch.compiler.reset()


def _call(prepared: Prepared, batch: Batch, rung: Rung, *, dry: bool) -> Callable[[], Tensor]:
    """One forward pass, to the last hidden states: ``(batch, length, hidden)``, or ``(1, tokens, hidden)``."""
    model: Any = prepared.model
    if rung.fused:
        given = batch.masked()
        run_fused = sb.Runner(model) if rung.way == "runner" else model
        return lambda: run_fused(**given).last_hidden_state
    if rung.unpadded:
        unpadded.register()
        model.set_attn_implementation(unpadded.NAME)
        inputs = batch.packed()
    else:
        model.set_attn_implementation("sdpa")
        inputs = batch.padded(prepared.dtype)
    if rung.execution != "compiled":
        return lambda: model(**inputs).last_hidden_state
    run = _compile(model, rung, dry=dry)

    def call() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return run(**inputs).last_hidden_state

    return call


def _compile(model: nn.Module, rung: Rung, *, dry: bool) -> Callable[..., Any]:
    torch.compiler.reset()
    if dry:
        return torch.compile(model, dynamic=False, backend="eager")
    mode = "max-autotune" if rung.way == "compiled_max" else "reduce-overhead"
    if rung.weights.name != TORCHAO:
        return torch.compile(model, dynamic=False, mode=mode)
    from torch._inductor import list_mode_options

    # A mode and options exclude each other, so the mode is given by its options.
    options = {**list_mode_options(mode), **TORCHAO_OPTIONS}
    return torch.compile(model, dynamic=False, options=options)


def _judge(prepared: Prepared, batch: Batch, rung: Rung, call: Callable[[], Tensor]) -> Row:
    """What comes out beside the reference, of the call itself and of a graph that replays it, the worse of them."""
    device = batch.ids.device
    on_gpu = _is_gpu(device)
    expected = prepared.expected(batch)

    def error_of(y: Tensor) -> float:
        return relative_error(y[0] if rung.unpadded else y[batch.real], expected)

    started = time.perf_counter()
    y = call()
    if on_gpu:
        torch.cuda.synchronize(device)
    first_call_s = time.perf_counter() - started
    buffer = torch.empty_like(y)
    del y
    _spoil(buffer)
    error = error_of(call())
    if on_gpu and rung.execution == "graph":
        replay = timing.capture(lambda: buffer.copy_(call()), device)
        buffer.fill_(math.nan)
        replay()
        error = max(error, error_of(buffer))
    found: Row = {
        "error": error,
        "error_limit": prepared.limit,
        "reference": prepared.compared,
        "first_call_s": first_call_s,
    }
    if prepared.dtype == torch.float32:
        found["matmul_precision"] = torch.get_float32_matmul_precision()
    return found


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _spoil(like: Tensor) -> None:
    """Frees blocks of NaN of this size, which the allocator hands out next: what is left unwritten then shows."""
    blocks = [torch.full_like(like, math.nan) for _ in range(SPOILT)]
    del blocks


def _times(prepared: Prepared, batch: Batch, rung: Rung, call: Callable[[], Tensor], budget_s: float) -> Row:
    device = batch.ids.device
    on_gpu = _is_gpu(device)
    graph = rung.execution == "graph"
    peak = None
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        # Alone: the anchor has activations of its own.
        timing.measure(call, device=device, budget_s=0.0, min_repeats=1, graph=graph)
        peak = torch.cuda.max_memory_allocated(device) - prepared.foreign_bytes
    calls = {"rung": call}
    if prepared.anchor is not None:
        calls["anchor"] = _anchor_call(prepared.anchor, batch, prepared.dtype)
    times = timing.measure_together(calls, device=device, budget_s=budget_s, graph=graph, single=True)
    found = times["rung"]
    a_second = 1e6 / found.median_us
    row: Row = {
        **found.to_dict(),
        "sequences_per_s": len(batch.lengths) * a_second,
        "tokens_per_s": sum(batch.lengths) * a_second,
        "peak_bytes": peak,
    }
    if prepared.anchor is not None:
        way = "graph" if graph else "eager"
        row |= {"anchor": f"{way}_{SHORT[prepared.dtype]}", "anchor_us": times["anchor"].median_us}
    return row


def _anchor_call(model: Any, batch: Batch, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The dense model on the padded batch."""
    inputs = batch.padded(dtype)
    return lambda: model(**inputs).last_hidden_state
