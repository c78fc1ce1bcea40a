"""Everything worth learning from one short visit to a GPU machine, in one command: ``make gpu-check``.

Builds the CUDA kernels for this GPU, runs the GPU tests, then times what this package must beat: the machine's
ceilings, torch's own dense and 2:4 linears, BERT end to end. No network, no virtual environment, no installed copy of
the package: any Python with torch will do (for the build, with nvcc, setuptools, pybind11 and ninja). README.md beside
this file says what the rows mean.

Environment: ``BUDGET_S`` seconds to spend (540); ``OUT`` folder for the results (``benchmarks/out``);
``DRY=1`` walks every step at toy sizes on a CPU; ``SPARSEBERT_COMMIT`` and ``SPARSEBERT_DATE`` where there is
no ``.git``.

Exit status: 0, or 1 when a step failed (what was measured is kept), or 2 when there is no CUDA device.

The steps run in a few child processes, so that a library that crashes, hangs or ruins its CUDA context costs
its own row only: the child is started again without it.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (str(ROOT), str(HERE)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

PARENT = "parent"  # the group of steps that are programs of their own
NO_DEVICE = 3  # exit statuses of a child process
DEVICE_LOST = 70
MOST_VARIANTS = 3  # of one peer that are measured in full
NOTHING_TO_RUN = 2  # that of tests/sanitize_cuda.py
# What a tool of compute-sanitizer says at its end where it found nothing.
CLEAN = {"memcheck": ("ERROR SUMMARY: 0 errors",), "racecheck": ("RACECHECK SUMMARY: 0 hazards",)}
MOST_RESTARTS = 4
GRACE_S = 5.0  # a step that has passed its time is stopped this much later
START_S = 40.0
RESERVE_S = 6.0  # left for stopping the last step and writing the summary
# A mistake in this program, not a peer's refusal: worth a failing exit status.
MISTAKES = (TypeError, AttributeError, NameError, LookupError, ImportError, SyntaxError)


@dataclass(frozen=True)
class Settings:
    """What the environment asks for; the same in the parent and in every child."""

    out: Path
    dry: bool
    budget_s: float

    @classmethod
    def read(cls) -> Settings:
        budget = os.environ.get("BUDGET_S") or "540"
        try:
            budget_s = float(budget)
        except ValueError:
            budget_s = 0.0
        if not 0 < budget_s < math.inf:
            raise SystemExit(f"gpu_check: BUDGET_S is {budget!r}, expected a positive number of seconds")
        return cls(
            out=Path(os.environ.get("OUT") or HERE / "out").resolve(),
            dry=os.environ.get("DRY", "") not in ("", "0"),
            budget_s=budget_s,
        )


@dataclass
class Outcome:
    """How a step ended: ``ok``, ``partial`` (out of time), ``skipped``, ``note`` or ``failed``, and why."""

    status: str = "ok"
    reason: str = ""


class NoDevice(Exception):
    """A child found no CUDA device."""


class Journal:
    """Rows and progress lines, written as they come, and what a restarted child must know of the one before
    it."""

    def __init__(self, settings: Settings, state: Path, started: float) -> None:
        self.settings = settings
        self.started = started
        self.rows_path = settings.out / "rows.jsonl"
        self.log_path = settings.out / "log.txt"
        self.state_path = state / "state.jsonl"
        self.environment_path = state / "environment"

    def say(self, text: str) -> None:
        line = f"[{time.time() - self.started:6.1f} s] {text}"
        print(line, file=sys.stderr, flush=True)
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def row(self, kind: str, **fields: Any) -> None:
        environment = self.environment_path.read_text() if self.environment_path.exists() else None
        row = {
            "kind": kind,
            "dry": self.settings.dry,
            "environment": environment,
            "at_s": round(time.time() - self.started, 3),
            **fields,
        }
        with self.rows_path.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(finite(row), allow_nan=False, default=str) + "\n")

    def step(self, name: str, outcome: Outcome, seconds: float, **fields: Any) -> None:
        row = {"step": name, "status": outcome.status, "seconds": round(seconds, 3), **fields}
        self.row("step", **row, reason=outcome.reason)
        self.say(f"{name}: {outcome.status}{f' - {outcome.reason}' if outcome.reason else ''} ({seconds:.1f} s)")

    def mark(self, **event: str) -> None:
        with self.state_path.open("a", encoding="utf-8") as state:
            state.write(json.dumps(event) + "\n")

    def marks(self, name: str) -> list[str]:
        """Everything marked under ``name``, in order."""
        if not self.state_path.exists():
            return []
        events = [json.loads(line) for line in self.state_path.read_text(encoding="utf-8").splitlines()]
        return [event[name] for event in events if name in event]


@dataclass
class Context:
    """What a step has at hand. torch is imported by the child only, so the parent starts at once."""

    settings: Settings
    journal: Journal
    until: float
    device: Any = None
    done: set[str] = field(default_factory=set)
    banned: set[str] = field(default_factory=set)
    mistakes: int = 0

    @property
    def dry(self) -> bool:
        return self.settings.dry

    def left(self) -> float:
        return self.until - time.time()

    def attempt(self, key: str, work: Callable[[], dict[str, Any]], **row: Any) -> None:
        """Run one measurement and write its row, whatever happens.

        ``work`` returns the row's remaining fields. A ``RuntimeError`` and its like is the library's refusal
        and is recorded with its reason; an error of this program's own making is counted and fails the run.
        """
        if key in self.done:
            return
        if row["peer"] in self.banned:
            refused = {"status": "refused", "reason": "the process died in this peer before; not tried again"}
            self.journal.row(**row, **refused)
            self.journal.mark(end=key)
            return
        self.journal.mark(begin=key)
        try:
            result = {"status": "ok", **work()}
        except Exception as error:
            result = self._unable(error)
        # The stand-ins of a dry run are exact, so a wrong result there is this program's.
        self.mistakes += self.dry and (result["status"] == "wrong" or "dropped" in result)
        self.journal.row(**row, **result)
        self.journal.mark(end=key)
        self.journal.say(f"{key}: {describe(result)}")

    def _unable(self, error: Exception) -> dict[str, Any]:
        reason = first_line(error)
        # A CUDA error such as an illegal access stays with the process: nothing after it could be measured.
        if self.device.type == "cuda":
            import torch

            try:
                torch.cuda.synchronize()
            except RuntimeError:
                self.journal.mark(lost=reason)
                self.journal.say(f"the device is lost to this process: {reason}")
                os._exit(DEVICE_LOST)
        if self.dry or isinstance(error, MISTAKES):
            self.mistakes += 1
            return {"status": "error", "reason": reason, "traceback": traceback.format_exc()}
        return {"status": "refused", "reason": reason}


@dataclass(frozen=True)
class Step:
    """``share`` is its part of the budget relative to the others; ``run`` is called in a child process, or in
    the parent where ``group`` is ``PARENT``. Steps of one group share a child."""

    group: str
    share: float
    run: Callable[[Context], Outcome]


def finite(value: Any) -> Any:
    """``value`` with None for every NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(result: dict[str, Any]) -> str:
    if "median_us" in result:
        return f"{result['median_us']:.2f} us, {result['status']}"
    return f"{result['status']}: {result.get('reason', '')}".rstrip(": ")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def load(name: str) -> ModuleType:
    """``sparsebert.bench.<name>``, which needs torch only; from its file if the package itself does not
    import here."""
    try:
        return importlib.import_module(f"sparsebert.bench.{name}")
    except Exception:
        path = ROOT / "sparsebert" / "bench" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"sparsebert_bench_{name}", path)
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up by name while it is being executed.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module


# The steps


def names_step(context: Context) -> Outcome:
    """Every torch name and argument that the other steps use exists in this torch."""
    import baselines

    missing = baselines.missing_names()
    context.journal.row("names", checked=len(baselines.OPERATORS) + len(baselines.ATTRIBUTES), missing=missing)
    return Outcome("failed", "; ".join(missing)) if missing else Outcome()


def environment_step(context: Context) -> Outcome:
    record = load("environment").environment(context.device)
    identity = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
    context.journal.environment_path.write_text(identity)
    context.journal.row("environment", record=record)
    label = load("environment").device_label(context.device)
    context.journal.say(f"on {label}, torch {record['torch']}, commit {record['commit']}")
    # Last, so that the record exists even where the package does not import.
    importlib.import_module("sparsebert")
    return Outcome()


def build_step(context: Context) -> Outcome:
    """``sparsebert._C`` for this GPU and no other, beside the package, where the steps after this one find it."""
    if context.dry:
        return Outcome("skipped", "DRY: nothing is compiled")
    import torch

    import peaks

    if peaks.find_nvcc() is None:
        return Outcome("skipped", "no nvcc on PATH or under CUDA_HOME: the CUDA kernels are not built")
    needed = [name for name in ("setuptools", "pybind11") if importlib.util.find_spec(name) is None]
    if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
        needed.append("ninja")
    if needed:
        return Outcome("skipped", f"building sparsebert._C needs {' and '.join(needed)}")
    capability = torch.cuda.get_device_capability(context.device)
    if capability < (8, 0):
        return Outcome("skipped", "the CUDA kernels need compute capability 8.0, not {}.{}".format(*capability))
    arch = "90a" if capability == (9, 0) else "{}{}".format(*capability)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    asked = {"SPARSEBERT_CUDA": "1", "SPARSEBERT_CUDA_ARCHS": arch}
    status, output = run_logged(command, context.settings.out / "build.log", context.left(), asked)
    if status is None:
        return Outcome("partial", f"stopped at its time limit; last line: {last_line(output)}")
    if status != 0:
        return Outcome("failed", f"status {status}: {last_line(output)}")
    # Nothing in this process has asked for the module before.
    from sparsebert.ops.cuda import extension
    from sparsebert.ops.devices import describe

    reason = extension.refusal(describe(context.device))
    return Outcome("failed", reason) if reason else Outcome("ok", f"sm_{arch}")


def pytest_step(context: Context) -> Outcome:
    """``pytest -m gpu`` in a process of its own; a dry run only collects."""
    log_path = context.settings.out / "pytest.log"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider"]
    # Without a GPU the tests can still be imported.
    command += ["--collect-only", "tests/gpu"] if context.dry else ["tests"]
    status, output = run_logged(command, log_path, context.left())
    tail = next((line for line in reversed(output.splitlines()) if line.strip()), "")
    if status is None:
        return Outcome("partial", f"stopped at its time limit; last line: {tail}")
    if status == 5:
        return Outcome("note", "no test is marked gpu")
    if "No module named pytest" in output:
        return Outcome("note", "pytest is not installed here")
    return Outcome("ok" if status == 0 else "failed", tail)


def ceilings_step(context: Context) -> Outcome:
    """What this machine can do at best: copy bandwidth, matrix rates, the cost of one kernel in a graph."""
    import torch

    import baselines

    timing = load("timing")
    on_gpu = context.device.type == "cuda"
    size = 64 if context.dry else 8192
    generator = torch.Generator(context.device).manual_seed(0)

    def normal(dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(size, size, device=context.device, generator=generator).to(dtype)

    def integers() -> torch.Tensor:
        values = torch.randint(-127, 128, (size, size), device=context.device, generator=generator)
        return values.to(torch.int8)

    def timed(call: Callable[[], Any] | Sequence[Callable[[], Any]]) -> dict[str, Any]:
        budget = 0.01 if context.dry else 0.5
        return timing.measure(call, device=context.device, budget_s=budget, graph=on_gpu).to_dict()

    def copy() -> dict[str, Any]:
        nbytes = 1 << 16
        if on_gpu and not context.dry:
            nbytes = min(4 << 30, torch.cuda.mem_get_info(context.device)[0] // 4)
        source = torch.randint(0, 256, (nbytes,), device=context.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        result = timed(lambda: target.copy_(source))
        return {**result, "bytes": 2 * nbytes, "gbps": 2 * nbytes / result["median_us"] / 1e3}

    def kernel_floor() -> dict[str, Any]:
        tiny = torch.zeros(32, device=context.device)
        return timed([lambda: tiny.add_(1.0)] * 100)

    def product(a: torch.Tensor, b: torch.Tensor, multiply: Callable[..., torch.Tensor]) -> dict[str, Any]:
        error = baselines.relative_error(multiply(a, b.t())[:64], a[:64].double() @ b.double().T)
        result = timed(lambda: multiply(a, b.t()))
        flops = 2 * size**3
        return {**result, "error": error, "flops": flops, "tflops": flops / result["median_us"] / 1e6}

    def scaled(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        one = torch.ones((), device=context.device)
        return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    fp8 = torch.float8_e4m3fn
    ceilings: dict[str, Callable[[], dict[str, Any]]] = {
        "copy": copy,
        "matmul_fp16": lambda: product(normal(torch.float16), normal(torch.float16), torch.mm),
        "matmul_int8": lambda: product(integers(), integers(), torch._int_mm),
        "kernel_in_graph": kernel_floor,
        "matmul_bf16": lambda: product(normal(torch.bfloat16), normal(torch.bfloat16), torch.mm),
        "matmul_fp8": lambda: product(normal(fp8), normal(fp8), scaled),
    }
    for name, work in ceilings.items():
        if context.left() < 2.0:
            return Outcome("partial", f"out of time before {name}")
        context.attempt(f"ceiling {name}", work, kind="ceiling", peer=name, size=size)
    return Outcome()


def peaks_step(context: Context) -> Outcome:
    """Each matrix instruction, memory and launch alone: what a kernel of this package can reach at best."""
    import peaks

    def unmeasured() -> dict[str, Any]:
        return {"status": "skipped", "reason": peaks.DRY}

    bench = None
    if not context.dry:
        import torch

        nvcc = peaks.find_nvcc()
        if nvcc is None:
            return Outcome("skipped", peaks.NO_NVCC)
        capability = torch.cuda.get_device_capability(context.device)
        # Beside the parent's state, so that a restarted child finds it built.
        folder = context.journal.state_path.parent / "peaks"
        try:
            path = peaks.build(nvcc, capability, folder, context.left())
        except TimeoutError as error:
            return Outcome("partial", str(error))
        bench = peaks.Bench(peaks.Library(path, context.device.index), capability, load("timing").Timing.from_samples)
    for peak in peaks.PEAKS:
        if context.left() < 1.0 and not context.dry:
            return Outcome("partial", f"out of time before {peak.name}")
        work = partial(bench.row, peak) if bench else unmeasured
        context.attempt(f"peak {peak.name}", work, **peaks.describe(peak))
    if bench is None:
        return Outcome("skipped", peaks.DRY)
    return Outcome("failed", f"not measured: {', '.join(bench.failed)}") if bench.failed else Outcome()


def linear_step(context: Context) -> Outcome:
    """Every peer on every shape and token count, as far as the time goes; see ``baselines.jobs`` for the
    order."""
    import torch

    import baselines
    import dry_ops

    timing = load("timing")
    on_gpu = context.device.type == "cuda"
    # Toy weights against a toy cache, so that a dry run rotates as well.
    cache = timing.l2_bytes(context.device) if on_gpu else 20_000
    jobs = baselines.jobs(context.dry)
    generator = torch.Generator(context.device).manual_seed(1)

    def copies_for(nbytes: int) -> int:
        return timing.rotation_count(nbytes, cache)

    def work(shape: baselines.Shape, tokens: int, peer: baselines.Peer) -> dict[str, Any]:
        case = baselines.Case(shape, tokens, context.device, generator, copies_for)
        if peer.needs_cuda and context.dry:
            with dry_ops.standing_in():
                built = peer.build(case)
                result = judge(built, case)
            if result["status"] == "ok":
                result["status"] = "skipped"
            reason = "DRY: needs CUDA; its calls were walked with stand-ins and not timed"
            return {**result, "reason": result.get("reason", reason)}
        built = peer.build(case)
        return {**judge(built, case), **clock(built, case)}

    def judge(built: baselines.Built, case: baselines.Case) -> dict[str, Any]:
        """Errors of every variant against the float64 reference; a variant that is wrong is dropped."""
        reference = built.reference()
        errors: dict[str, float] = {}
        refusals: dict[str, str] = {}
        for name, calls in list(built.variants.items()):
            try:
                spoil(calls[0])
                y = calls[0]()[: case.tokens]
            except RuntimeError as error:
                refusals[name] = first_line(error)
                del built.variants[name]
                if not built.variants and not errors:
                    raise
                continue
            errors[name] = baselines.relative_error(y, reference)
            del y
            if not errors[name] <= built.limit:
                del built.variants[name]
        worst = max(errors[name] for name in built.variants or errors)
        result: dict[str, Any] = {
            "status": "ok",
            "error": worst,
            "error_limit": built.limit,
            "reference": "float64",
            "flops": baselines.linear_flops(case),
            "bytes": built.moved_bytes,
            "weight_bytes": built.weight_bytes,
            **built.notes,
        }
        if not built.variants:
            result["status"] = "wrong"
            result["reason"] = f"error {worst:.3g} is over the limit {built.limit:.3g}"
        elif len(built.variants) < len(errors) + len(refusals):
            faults = {name: f"error {error:.3g}" for name, error in errors.items()} | refusals
            result["dropped"] = {name: fault for name, fault in faults.items() if name not in built.variants}
        return result

    def spoil(call: Callable[[], torch.Tensor]) -> None:
        """Free a spoilt block of y's size, which the allocator hands out next: what a kernel leaves unwritten
        shows."""
        y = call()
        shape, dtype = y.shape, y.dtype
        del y
        value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        torch.full(shape, value, dtype=dtype, device=context.device)

    def clock(built: baselines.Built, case: baselines.Case) -> dict[str, Any]:
        """Times of what passed: weights out of the cache, and for comparison one weight again and again."""
        if not built.variants:
            return {}
        result: dict[str, Any] = {}

        def together(calls: dict[str, Any], budget_s: float) -> dict[str, Any]:
            graph = on_gpu and "graph_refused" not in result
            try:
                return timing.measure_together(calls, device=context.device, budget_s=budget_s, graph=graph)
            except RuntimeError as error:
                if not graph:
                    raise
                torch.cuda.synchronize()
                result["graph_refused"] = first_line(error)
                return timing.measure_together(calls, device=context.device, budget_s=budget_s)

        timings: dict[str, Any] = {}
        chosen = list(built.variants)
        if len(chosen) > MOST_VARIANTS:
            # A first, short round; the fastest of it are measured in full.
            timings = together(built.variants, (0.001 if context.dry else 0.01) * len(chosen))
            chosen = sorted(chosen, key=lambda name: timings[name].median_us)[:MOST_VARIANTS]
        calls: dict[str, Any] = {}
        for name in chosen:
            rotated = built.variants[name]
            calls[name] = rotated
            calls[f"{name} resident"] = [rotated[0]] * len(rotated)
        timings |= together(calls, 0.004 if context.dry else 0.04 * len(calls))
        best = min(chosen, key=lambda name: timings[name].median_us)
        time_us = timings[best].median_us
        flops, nbytes = baselines.linear_flops(case), built.moved_bytes
        return {
            **result,
            **timings[best].to_dict(),
            "copies": len(built.variants[best]),
            "resident_us": timings[f"{best} resident"].median_us,
            "algorithm": best,
            "variants_us": {name: timings[name].median_us for name in built.variants},
            "tflops": flops / time_us / 1e6,
            "gbps": nbytes / time_us / 1e3,
        }

    for number, (shape, tokens, peer) in enumerate(jobs):
        if context.left() < (0.1 if context.dry else 2.0):
            return Outcome("partial", f"out of time after {number} of {len(jobs)}")
        key = f"linear {number + 1}/{len(jobs)} {shape.role} T={tokens} {peer.name}"

        context.attempt(
            key,
            partial(work, shape, tokens, peer),
            kind="linear",
            op="linear",
            peer=peer.name,
            role=shape.role,
            out_features=shape.out_features,
            in_features=shape.in_features,
            tokens=tokens,
            dtype=peer.dtype,
            epilogue=peer.epilogue,
        )
        if on_gpu and number % 40 == 39:
            gc.collect()
    return Outcome()


SEQUENCES = ((8, 128), (32, 128), (1, 128), (32, 384))  # batch, tokens each


def bert(size: str, dry: bool, device: Any) -> tuple[Any, dict[str, int]]:
    """A BERT encoder of random weights in half precision, and its sizes. No hub, no pooler."""
    import torch
    from transformers import BertConfig, BertModel

    layers, hidden, heads = (12, 768, 12) if size == "base" else (24, 1024, 16)
    vocabulary = 30522
    if dry:
        layers, hidden, heads, vocabulary = 1, 32, 2, 100
    options: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        vocab_size=vocabulary,
        **options,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = BertModel(config, add_pooling_layer=False)
    return model.eval().to(device, torch.float16), {
        "layers": layers,
        "hidden": hidden,
        "vocabulary": vocabulary,
    }


def bert_flops(sizes: dict[str, int], batch: int, length: int) -> int:
    """Multiplications and additions of the linear layers and the two products of attention."""
    hidden, tokens = sizes["hidden"], batch * length
    return sizes["layers"] * (2 * tokens * 12 * hidden**2 + 4 * tokens * length * hidden)


def bert_row(context: Context, model: Any, sizes: dict[str, int], ids: Any, mode: str) -> dict[str, Any]:
    """Check one model on one batch of token ids against itself in float32, then time it."""
    import torch

    import baselines

    timing = load("timing")
    on_gpu = context.device.type == "cuda"
    # The weights are float16 values, so the model in float32 has the same ones.
    reference = model.float()(input_ids=ids).last_hidden_state.double()
    model.half()

    # No padding and no mask: the dense model at its best.
    def call() -> torch.Tensor:
        return model(input_ids=ids).last_hidden_state

    def compiled_call() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(input_ids=ids).last_hidden_state

    if mode == "compiled":
        torch.compiler.reset()
        options: dict[str, Any] = {"backend": "eager"} if context.dry else {"mode": "reduce-overhead"}
        compiled = torch.compile(model, dynamic=False, **options)
        call = compiled_call
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(context.device)
    started = time.perf_counter()
    error = baselines.relative_error(call(), reference)
    limit = 2e-2
    result: dict[str, Any] = {
        "error": error,
        "error_limit": limit,
        "reference": "float32",
        "first_call_s": time.perf_counter() - started,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
    if not error <= limit:
        return {**result, "status": "wrong", "reason": f"error {error:.3g} is over the limit {limit}"}
    if mode == "graph" and not on_gpu:
        return {**result, "status": "skipped", "reason": "DRY: needs CUDA"}
    budget = 0.02 if context.dry else 0.8
    found = timing.measure(call, device=context.device, budget_s=budget, graph=mode == "graph")
    if on_gpu:
        result["peak_bytes"] = torch.cuda.max_memory_allocated(context.device)
    flops = bert_flops(sizes, *ids.shape)
    return {
        **result,
        **found.to_dict(),
        "flops": flops,
        "tflops": flops / found.median_us / 1e6,
        "tokens_per_s": ids.numel() / found.median_us * 1e6,
    }


def bert_runs(context: Context, modes: Sequence[str]) -> Outcome:
    """Both models at every batch in every one of ``modes``."""
    import torch

    sequences = ((2, 8),) if context.dry else SEQUENCES
    longest = 0.0
    for size in ("base",) if context.dry else ("base", "large"):
        model, sizes = bert(size, context.dry, context.device)
        generator = torch.Generator(context.device).manual_seed(2)
        for (batch, length), mode in itertools.product(sequences, modes):
            key = f"bert-{size} {batch}x{length} dense_{mode}"
            # The longest so far is the best guess of what the next one costs; compiling takes most of it.
            if context.left() < max(0.1 if context.dry else 3.0, 1.1 * longest):
                return Outcome("partial", f"out of time before {key}")
            started = time.time()
            ids = torch.randint(0, sizes["vocabulary"], (batch, length), device=context.device, generator=generator)
            context.attempt(
                key,
                partial(bert_row, context, model, sizes, ids, mode),
                kind="model",
                peer=f"dense_{mode}",
                model=f"bert-{size}",
                batch=batch,
                length=length,
                dtype="float16",
                attention="sdpa",
            )
            longest = max(longest, time.time() - started)
        del model
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
    return Outcome()


def models_step(context: Context) -> Outcome:
    """BERT-base and -large end to end in half precision: as Python runs it, and as a CUDA graph."""
    return bert_runs(context, ("graph", "eager"))


def compile_step(context: Context) -> Outcome:
    """The same models through ``torch.compile``, which takes up to a minute each."""
    return bert_runs(context, ("compiled",))


def small_case(device: str) -> None:
    """One packed layer, forward, against the dense product: small enough for a memory checker."""
    import torch

    import sparsebert as sb
    from sparsebert.formats import nm

    torch.manual_seed(0)
    dtype = torch.float16
    linear = torch.nn.Linear(128, 64, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(nm.project(linear.weight, 2, 4))
    packed = sb.nn.NMLinear.from_linear(linear, sb.NMConfig(2, 4), name="small case").to(device)
    x = torch.randn(24, 128, dtype=dtype)
    with torch.no_grad():
        y = packed(x.to(device)).cpu().double()
        expected = x.double() @ linear.weight.double().T + linear.bias.double()
    error = float((y - expected).norm() / expected.norm())
    if not error <= 2e-3:
        raise RuntimeError(f"packed layer on {device}: relative error {error:.3g}, expected at most 2e-3")
    print(f"packed layer on {device}: relative error {error:.3g}")


def sanitizer_step(context: Context) -> Outcome:
    """The small case under compute-sanitizer's memory check, where that program is there and works."""
    case = [sys.executable, str(HERE / "gpu_check.py"), "--small-case"]
    log_path = context.settings.out / "sanitizer.log"
    if context.dry:
        status, output = run_logged([*case, "cpu"], log_path, context.left())
        if status != 0:
            return Outcome("failed", f"the small case ended with status {status}: {last_line(output)}")
        return Outcome("skipped", "DRY: the small case ran on the CPU without a memory checker")
    return sanitized(context, "memcheck", [*case, "cuda"], log_path)


def every_kernel_step(context: Context, tool: str) -> Outcome:
    """Every instantiation of the CUDA kernels under one of compute-sanitizer's tools."""
    case = [sys.executable, str(ROOT / "tests" / "sanitize_cuda.py")]
    log_path = context.settings.out / f"{tool}.log"
    if not context.dry:
        return sanitized(context, tool, case, log_path)
    status, output = run_logged([*case, "--list"], log_path, context.left())
    if status not in (0, NOTHING_TO_RUN):
        return Outcome("failed", f"listing the cases ended with status {status}: {last_line(output)}")
    return Outcome("skipped", f"DRY: {last_line(output)}")


def find_sanitizer() -> str | None:
    """On PATH, or beside nvcc."""
    import peaks

    beside = Path(nvcc).with_name("compute-sanitizer") if (nvcc := peaks.find_nvcc()) else None
    return shutil.which("compute-sanitizer") or (shutil.which(str(beside)) if beside else None)


def sanitized(context: Context, tool: str, case: Sequence[str], log_path: Path) -> Outcome:
    """A program under one of compute-sanitizer's tools."""
    program = find_sanitizer()
    if program is None:
        return Outcome("note", "unavailable: compute-sanitizer is not on PATH")
    # API errors are left out: torch probes for features and handles the refusals.
    options = ["--tool", tool, "--error-exitcode", "9"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    status, output = run_logged([program, *options, *case], log_path, context.left())
    if status is None:
        return Outcome("note", f"unavailable: it did not finish in its time; last line: {last_line(output)}")
    if status == 0 and (clean := next((text for text in CLEAN[tool] if text in output), None)):
        return Outcome("ok", clean.partition(": ")[2])
    if unsupported := [line.strip() for line in output.splitlines() if "not supported" in line]:
        return Outcome("note", f"unavailable: {unsupported[0]}")
    if nothing := [line for line in output.splitlines() if line.startswith("sanitize_cuda: ")]:
        return Outcome("note", f"unavailable: {nothing[0].partition(': ')[2]}")
    return Outcome("failed", f"status {status}: {last_line(output)}")


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:300]


# In the order they run. Shares are parts of whatever time is left, so what a step does not use goes to those
# after it.
STEPS: dict[str, Step] = {
    # By itself: the processes after it load what it has built.
    "build": Step("build", 20, build_step),
    "names": Step("first", 1, names_step),
    "environment": Step("first", 1, environment_step),
    "ceilings": Step("first", 5, ceilings_step),
    "peaks": Step("first", 13, peaks_step),
    "pytest": Step(PARENT, 26, pytest_step),
    "linear": Step("linear", 50, linear_step),
    "models": Step("models", 10, models_step),
    "compile": Step("models", 15, compile_step),
    "sanitizer": Step(PARENT, 5, sanitizer_step),
    "memcheck": Step(PARENT, 6, partial(every_kernel_step, tool="memcheck")),
    "racecheck": Step(PARENT, 6, partial(every_kernel_step, tool="racecheck")),
}


# Running the steps


def step_end(names: Sequence[str], index: int, until: float, count: int = 1) -> float:
    """When ``count`` steps from ``index`` on must end, if all steps from there on share the time to
    ``until``."""
    now = time.time()
    shares = [STEPS[name].share for name in names[index:]]
    return now + max(0.0, until - now) * sum(shares[:count]) / sum(shares)


def together(names: Sequence[str], dry: bool) -> list[str]:
    """The steps at the head of ``names`` that run in one process."""
    group = STEPS[names[0]].group
    if group == PARENT:
        return [names[0]]
    same = itertools.takewhile(lambda name: STEPS[name].group != PARENT if dry else STEPS[name].group == group, names)
    return list(same)


def run_step(name: str, context: Context) -> Outcome:
    """Run one step here and write its row; nothing it raises gets past."""
    context.journal.mark(step_begin=name)
    started = time.time()
    mistakes = context.mistakes
    trace = ""
    try:
        outcome = STEPS[name].run(context)
    except Exception as error:
        outcome = Outcome("failed", first_line(error))
        trace = traceback.format_exc()
        print(trace, file=sys.stderr, flush=True)
    if context.mistakes > mistakes and outcome.status != "failed":
        outcome = Outcome("failed", f"{context.mistakes - mistakes} rows have status error")
    context.journal.step(name, outcome, time.time() - started, **({"traceback": trace} if trace else {}))
    context.journal.mark(step_end=name)
    return outcome


def child(names: Sequence[str], settings: Settings, journal: Journal, until: float) -> int:
    """Run steps in this process: what a child of :func:`main` does."""
    import torch

    if not settings.dry and not torch.cuda.is_available():
        return NO_DEVICE
    device = torch.device("cpu") if settings.dry else torch.device("cuda", torch.cuda.current_device())
    torch.set_grad_enabled(False)
    if settings.dry:
        torch.set_num_threads(1)  # toy sizes: more threads only wait for each other
    context = Context(settings, journal, until, device)
    context.done = set(journal.marks("end"))
    context.banned = set(journal.marks("ban"))
    failed = False
    for index, name in enumerate(names):
        context.until = step_end(names, index, until)
        failed = run_step(name, context).status == "failed" or failed
    return 1 if failed else 0


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_logged(
    command: Sequence[str], log_path: Path, limit_s: float, more: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Run a program with its output in a file and ``more`` in its environment; its exit status, or None if it was
    stopped, and that output."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **(more or {})}
    with log_path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status: int | None = process.wait(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            stop(process)
            status = None
    return status, log_path.read_text(encoding="utf-8", errors="replace")


def run_group(names: list[str], journal: Journal, state: Path, until: float) -> bool:
    """Run steps in a child process, again without the culprit if it dies. True if something failed."""
    failed = False
    for _ in range(1 + MOST_RESTARTS):
        command = [sys.executable, sys.argv[0], "--steps", ",".join(names), "--state", str(state)]
        command += ["--started", str(journal.started), "--until", str(until)]
        process = subprocess.Popen(command, start_new_session=True)
        started = time.time()
        try:
            status: int | None = process.wait(timeout=max(1.0, until + GRACE_S - time.time()))
        except subprocess.TimeoutExpired:
            stop(process)
            status = None
        if status == NO_DEVICE:
            raise NoDevice
        ended = set(journal.marks("step_end"))
        names = [name for name in names if name not in ended]
        if status in (0, 1) and not names:
            return failed or status == 1
        begun = journal.marks("begin")
        open_key = begun[-1] if begun and begun[-1] not in journal.marks("end") else ""
        if status is None:
            for name in names:
                reason = f"stopped at its time limit{f' in {open_key}' if open_key else ''}"
                journal.step(name, Outcome("partial", reason), time.time() - started)
            return failed
        failed = True
        lost = journal.marks("lost")
        reason = lost[-1] if status == DEVICE_LOST and lost else f"the process ended with status {status}"
        if open_key:
            # The row's own fields died with the child; its key names the measurement and ends in the peer.
            peer = open_key.rsplit(" ", 1)[-1]
            journal.row("crash", peer=peer, key=open_key, status="crashed", reason=reason)
            journal.mark(end=open_key)
            journal.mark(ban=peer)
            journal.say(f"{open_key}: crashed: {reason}; going on without {peer}")
        else:
            journal.step(names[0], Outcome("failed", reason), time.time() - started)
            names = names[1:]
        if not names:
            return failed
    for name in names:
        journal.step(name, Outcome("failed", f"given up after {MOST_RESTARTS} restarts"), 0.0)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    internal = parser.add_argument_group("used by this program itself")
    internal.add_argument("--steps")
    internal.add_argument("--state", type=Path)
    internal.add_argument("--started", type=float)
    internal.add_argument("--until", type=float)
    internal.add_argument("--small-case", metavar="DEVICE")
    options = parser.parse_args()
    if options.small_case:
        small_case(options.small_case)
        return 0
    settings = Settings.read()
    if options.steps:
        journal = Journal(settings, options.state, options.started)
        return child(options.steps.split(","), settings, journal, options.until)

    started = time.time()
    until = started + settings.budget_s - RESERVE_S
    settings.out.mkdir(parents=True, exist_ok=True)
    logs = ("log.txt", *(f"{name}.log" for name in ("build", "pytest", "sanitizer", "memcheck", "racecheck")))
    for name in ("rows.jsonl", "summary.md", *logs):
        (settings.out / name).unlink(missing_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(settings, Path(folder), started)
        order = list(STEPS)
        if settings.dry:
            # One child for everything: importing torch again and again would be most of a dry run.
            order.sort(key=lambda name: STEPS[name].group == PARENT)
        index = 0
        while index < len(order):
            members = together(order[index:], settings.dry)
            end = step_end(order, index, until, len(members))
            index += len(members)
            if STEPS[members[0]].group == PARENT:
                failed = run_step(members[0], Context(settings, journal, end)).status == "failed" or failed
                continue
            # However small its share, a child needs time to import torch, which takes long on a cold disk.
            end = max(end, min(until, time.time() + START_S))
            try:
                failed = run_group(members, journal, Path(folder), end) or failed
            except NoDevice:
                print("gpu_check: no CUDA device here; DRY=1 walks the steps on a CPU", file=sys.stderr)
                return 2
        begun = time.time()
        try:
            rows = [json.loads(line) for line in journal.rows_path.read_text(encoding="utf-8").splitlines()]
            text = importlib.import_module("sparsebert.bench.report.summary").summary(rows)
            (settings.out / "summary.md").write_text(text, encoding="utf-8")
            outcome = Outcome()
        except Exception as error:
            traceback.print_exc()
            outcome = Outcome("failed", first_line(error))
            failed = True
        journal.step("summary", outcome, time.time() - begun)
        journal.say(f"results in {settings.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
