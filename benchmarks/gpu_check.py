"""Everything worth learning from one short visit to a GPU machine, in one command: ``make gpu-check``.

Builds the CUDA kernels for this GPU, runs the GPU tests, then times what this package must beat: the machine's
ceilings, torch's own dense and 2:4 linears, BERT end to end. No network, no virtual environment, no installed copy of
the package: any Python with torch will do (for the build, with nvcc, setuptools, pybind11 and ninja). README.md beside
this file says what the rows mean.

Environment: ``BUDGET_S`` seconds to spend (540); ``OUT`` folder for the results (``benchmarks/out``);
``STEPS`` some of the steps, by name and with commas (all); ``RESUME`` rows of an earlier run of this commit, whose
measurements are not made again; ``DRY=1`` walks every step at toy sizes on a CPU; ``SPARSEBERT_COMMIT`` and
``SPARSEBERT_DATE`` where there is no ``.git``.

Exit status: 0, or 1 when a step failed (what was measured is kept), or 2 when there is no CUDA device.

The steps run in a few child processes, so that a library that crashes, hangs or ruins its CUDA context costs
its own row only: the child is started again without it.
"""

from __future__ import annotations

import argparse
import gc
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
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from sparsebert.bench.jobs import Job

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (str(ROOT), str(HERE)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

PARENT = "parent"  # the group of steps that are programs of their own
NO_DEVICE = 3  # exit statuses of a child process
DEVICE_LOST = 70
NOTHING_TO_RUN = 2  # that of tests/sanitize_cuda.py, _wgmma.py and _triton.py
SANITIZED = {"cuda": "--list", "wgmma": "--list", "triton": "--dry"}  # and their option for a dry run
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
    steps: tuple[str, ...] = ()
    resume: Path | None = None

    @classmethod
    def read(cls) -> Settings:
        budget = os.environ.get("BUDGET_S") or "540"
        try:
            budget_s = float(budget)
        except ValueError:
            budget_s = 0.0
        if not 0 < budget_s < math.inf:
            raise SystemExit(f"gpu_check: BUDGET_S is {budget!r}, expected a positive number of seconds")
        steps = tuple(filter(None, os.environ.get("STEPS", "").split(",")))
        if unknown := [name for name in steps if name not in STEPS]:
            raise SystemExit(f"gpu_check: STEPS has {unknown[0]!r}, expected some of {', '.join(STEPS)}")
        resume = os.environ.get("RESUME")
        return cls(
            out=Path(os.environ.get("OUT") or HERE / "out").resolve(),
            dry=os.environ.get("DRY", "") not in ("", "0"),
            budget_s=budget_s,
            steps=steps,
            resume=Path(resume) if resume else None,
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

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        if not self.rows_path.exists():
            return []
        return [json.loads(line) for line in self.rows_path.read_text(encoding="utf-8").splitlines()]

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
            self.journal.row(**row, key=key, **refused)
            self.journal.mark(end=key)
            return
        self.journal.mark(begin=key)
        try:
            result = {"status": "ok", **work()}
        except Exception as error:
            result = self._unable(error)
        # The stand-ins of a dry run are exact, so a wrong result there is this program's.
        self.mistakes += self.dry and (result["status"] == "wrong" or "dropped" in result)
        self.journal.row(**row, key=key, **result)
        self.journal.mark(end=key)
        self.journal.say(f"{key}: {describe(result)}")

    def _unable(self, error: Exception) -> dict[str, Any]:
        from sparsebert.bench.jobs import Missing

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
        if isinstance(error, MISTAKES) or (self.dry and not isinstance(error, Missing)):
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
    from sparsebert.bench.linear import library

    missing = library.missing_names()
    context.journal.row("names", checked=len(library.OPERATORS) + len(library.ATTRIBUTES), missing=missing)
    return Outcome("failed", "; ".join(missing)) if missing else Outcome()


def environment_step(context: Context) -> Outcome:
    record = load("environment").environment(context.device)
    context.journal.environment_path.write_text(load("records").identity(record))
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


def walk(context: Context, jobs: Sequence[Job], least_s: float) -> Outcome:
    """Every job in order, as far as the time goes. None is begun with less than ``least_s`` left, or with less than
    the longest so far took: in a dry run a tenth of a second will do."""
    longest = 0.0
    for number, job in enumerate(jobs):
        if context.left() < (0.1 if context.dry else max(least_s, longest)):
            return Outcome("partial", f"out of time after {number} of {len(jobs)}")
        started = time.time()
        context.attempt(job.key, job.work, **job.row)
        longest = max(longest, time.time() - started)
        if context.device.type == "cuda" and number % 40 == 39:
            gc.collect()
    return Outcome()


def ceilings_step(context: Context) -> Outcome:
    """What this machine can do at best: copy bandwidth, matrix rates, the cost of one kernel in a graph."""
    from sparsebert.bench.linear import ceilings

    return walk(context, ceilings.jobs(context.device, dry=context.dry), 2.0)


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


def sweep(context: Context, *, compiled: bool) -> Outcome:
    from sparsebert.bench.linear import ceilings
    from sparsebert.bench.linear import sweep as linear

    rates = ceilings.of(context.journal.rows())
    jobs = linear.jobs(context.device, dry=context.dry, budget_s=0.006 if context.dry else 0.12, ceilings=rates)
    return walk(context, [job for job in jobs if job.row["compiled"] == compiled], 2.0)


def linear_step(context: Context) -> Outcome:
    """Every peer on every shape and token count, as far as the time goes, the most telling first."""
    return sweep(context, compiled=False)


def compiled_linear_step(context: Context) -> Outcome:
    """The peers that are compiled for seconds: torch.compile with max-autotune, torchao under it."""
    return sweep(context, compiled=True)


def never_slower_step(context: Context) -> Outcome:
    """What ``sb.tune`` holds beside the best dense path; a layer that is slower fails the step."""
    from sparsebert.bench.linear import never_slower

    budget = 0.005 if context.dry else 0.1
    jobs = never_slower.jobs(context.device, dry=context.dry, budget_s=budget)
    with mock.patch.dict(os.environ, SPARSEBERT_CACHE=str(context.journal.state_path.parent / "tuned")):
        outcome = walk(context, jobs, 3.0)
    rows = [row for row in context.journal.rows() if row["kind"] == "never_slower"]
    if failures := [row for row in rows if row["status"] == "failed"]:
        first = failures[0]
        return Outcome("failed", f"{len(failures)} of {len(rows)} are slower than dense, first {first['key']}")
    return outcome


def models_step(context: Context) -> Outcome:
    """BERT-base and -large of random weights, dense and in every format, as Python runs them and as CUDA graphs."""
    from sparsebert.bench.models import ladder

    jobs = ladder.jobs(context.device, compiled=False, dry=context.dry)
    return walk(context, jobs, 5.0)


def compiled_models_step(context: Context) -> Outcome:
    """The same models through ``torch.compile``, which takes up to a minute each."""
    from sparsebert.bench.models import ladder

    jobs = ladder.jobs(context.device, dry=context.dry)
    return walk(context, [job for job in jobs if job.row["execution"] == "compiled"], 30.0)


def every_kernel_step(context: Context, tool: str) -> Outcome:
    """Every instantiation of the CUDA kernels, and every Triton kernel, under one of compute-sanitizer's tools."""
    log_path = context.settings.out / f"{tool}.log"
    found = {}
    for number, (name, dry_option) in enumerate(SANITIZED.items()):
        case = [sys.executable, str(ROOT / "tests" / f"sanitize_{name}.py")]
        limit_s = context.left() / (len(SANITIZED) - number)
        if not context.dry:
            found[name] = sanitized(tool, case, log_path, limit_s)
            continue
        status, output = run_logged([*case, dry_option], log_path, limit_s)
        said = last_line(output)
        found[name] = Outcome("skipped" if status in (0, NOTHING_TO_RUN) else "failed", f"status {status}: {said}")
    worst = min((outcome.status for outcome in found.values()), key=("failed", "note", "skipped", "ok").index)
    return Outcome(worst, "; ".join(f"{name}: {outcome.reason}" for name, outcome in found.items()))


def find_sanitizer() -> str | None:
    """On PATH, or beside nvcc."""
    import peaks

    beside = Path(nvcc).with_name("compute-sanitizer") if (nvcc := peaks.find_nvcc()) else None
    return shutil.which("compute-sanitizer") or (shutil.which(str(beside)) if beside else None)


def sanitized(tool: str, case: Sequence[str], log_path: Path, limit_s: float) -> Outcome:
    """A program under one of compute-sanitizer's tools."""
    program = find_sanitizer()
    if program is None:
        return Outcome("note", "unavailable: compute-sanitizer is not on PATH")
    # API errors are left out: torch probes for features and handles the refusals.
    options = ["--tool", tool, "--error-exitcode", "9"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    status, output = run_logged([program, *options, *case], log_path, limit_s)
    if status is None:
        return Outcome("note", f"unavailable: it did not finish in its time; last line: {last_line(output)}")
    if status == 0 and (clean := next((text for text in CLEAN[tool] if text in output), None)):
        return Outcome("ok", clean.partition(": ")[2])
    if unsupported := [line.strip() for line in output.splitlines() if "not supported" in line]:
        return Outcome("note", f"unavailable: {unsupported[0]}")
    if nothing := [line for line in output.splitlines() if line.startswith("sanitize_")]:
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
    "linear": Step("linear", 40, linear_step),
    "never_slower": Step("never_slower", 10, never_slower_step),
    "models": Step("models", 20, models_step),
    "compiled_linear": Step("compiled_linear", 8, compiled_linear_step),
    "compiled_models": Step("compiled_models", 12, compiled_models_step),
    "memcheck": Step(PARENT, 9, partial(every_kernel_step, tool="memcheck")),
    "racecheck": Step(PARENT, 9, partial(every_kernel_step, tool="racecheck")),
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
    """Run a program with its output at the end of a file and ``more`` in its environment; its exit status, or None if
    it was stopped, and that output."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **(more or {})}
    with log_path.open("a", encoding="utf-8") as log:
        begun = log.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status: int | None = process.wait(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            stop(process)
            status = None
    return status, log_path.read_bytes()[begun:].decode(errors="replace")


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


def measured_before(path: Path | None) -> list[str]:
    """The keys of the measurements in the rows of an earlier run; read first, as it may lie where this one writes."""
    if path is None:
        return []
    if not path.is_file():
        raise SystemExit(f"gpu_check: RESUME is {str(path)!r}, expected the rows.jsonl of an earlier run")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    # Ceilings are those of the machine of now.
    kept = [row for row in rows if "key" in row and row["kind"] != "ceiling"]
    return [row["key"] for row in kept if row["status"] not in ("crashed", "error")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    internal = parser.add_argument_group("used by this program itself")
    internal.add_argument("--steps")
    internal.add_argument("--state", type=Path)
    internal.add_argument("--started", type=float)
    internal.add_argument("--until", type=float)
    options = parser.parse_args()
    settings = Settings.read()
    if options.steps:
        journal = Journal(settings, options.state, options.started)
        return child(options.steps.split(","), settings, journal, options.until)

    started = time.time()
    until = started + settings.budget_s - RESERVE_S
    before = measured_before(settings.resume)
    settings.out.mkdir(parents=True, exist_ok=True)
    logs = ("log.txt", *(f"{name}.log" for name in ("build", "pytest", "memcheck", "racecheck")))
    for name in ("rows.jsonl", "summary.md", *logs):
        (settings.out / name).unlink(missing_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(settings, Path(folder), started)
        for key in before:
            journal.mark(end=key)
        # What the user tuned has no part in it.
        os.environ["SPARSEBERT_CACHE"] = folder
        order = [name for name in STEPS if not settings.steps or name in settings.steps]
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
