"""`make gpu-check` on a machine without a GPU: the dry run in full, and what a mistake, a crash and a refusal do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import torch  # noqa: E402

import gpu_check  # noqa: E402
from sparsebert.bench.jobs import Missing  # noqa: E402
from sparsebert.bench.linear import sweep  # noqa: E402
from sparsebert.bench.models import rungs  # noqa: E402

STEPS = [
    *("build", "names", "environment", "ceilings", "peaks", "pytest", "linear", "never_slower", "models"),
    *("compiled_linear", "compiled_models", "memcheck", "racecheck", "summary"),
]


def run(script: Path, out: Path, **environment: str) -> tuple[int, list[dict], str]:
    """Run the check (or a driver of it) and return its exit status, its rows and its progress lines."""
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    path = out / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return done.returncode, [json.loads(line) for line in lines], done.stderr


def driver(path: Path, body: str) -> Path:
    """A script that is the GPU check but for ``body``, which may edit ``gpu_check``; its children run it too."""
    path.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\nimport gpu_check\n"
        f"from gpu_check import Outcome, Step\n{body}\nsys.exit(gpu_check.main())\n"
    )
    return path


def steps(rows: list[dict]) -> dict[str, str]:
    return {row["step"]: row["status"] for row in rows if row["kind"] == "step"}


@pytest.mark.slow
def test_dry_run_walks_every_step(tmp_path: Path):
    status, rows, log = run(ROOT / "benchmarks" / "gpu_check.py", tmp_path, DRY="1")
    assert status == 0, log
    files = list(tmp_path.iterdir())
    assert len(files) <= 8 and all(file.is_file() for file in files)
    assert sorted(steps(rows)) == sorted(STEPS)
    assert "failed" not in steps(rows).values() and "partial" not in steps(rows).values()
    assert all(row["dry"] for row in rows)

    record = next(row for row in rows if row["kind"] == "environment")
    assert all(row["environment"] == record["environment"] for row in rows if row["at_s"] > record["at_s"])

    found = [row for row in rows if row["kind"] == "peak"]
    assert len(found) > 50 and {row["status"] for row in found} == {"skipped"}
    assert not any("us" in key or "cycles" in key for row in found for key in row if key != "status")

    linears = [row for row in rows if row["kind"] == "linear"]
    missing = [row for row in linears if row["status"] == "refused"]
    assert all(row["peer"].startswith("torchao") and "does not import" in row["reason"] for row in missing)
    linears = [row for row in linears if row not in missing]
    assert {row["status"] for row in linears} == {"ok", "skipped"}
    for row in linears:
        # A skipped peer was walked with stand-ins and its result compared all the same.
        assert row["error"] <= row["error_limit"]
        assert row["flops"] == 2 * row["tokens"] * row["out_features"] * row["in_features"]
        assert row["bytes"] > row["weight_bytes"] > 0
        assert ("median_us" in row) == (row["status"] == "ok") == ("reached" in row)
    peers = {peer.name: peer for peer in sweep.every_peer(torch.device("cpu"), dry=True)}
    assert {row["peer"] for row in linears + missing} == set(peers)
    assert {row["peer"] for row in linears if row["status"] == "skipped"} == {
        name for name, peer in peers.items() if peer.needs_cuda
    }
    assert all(row["padded_tokens"] == 8 for row in linears if row["peer"] == "cusparselt_fp16" and row["tokens"] == 1)

    slower = [row for row in rows if row["kind"] == "never_slower"]
    assert slower and {row["status"] for row in slower} == {"skipped"} and all(row["ratio"] > 0 for row in slower)

    models = [row for row in rows if row["kind"] == "model"]
    assert {row["peer"] for row in models} == {*rungs.FIRST, *rungs.MORE, *rungs.COMPILED}
    assert {row["status"] for row in models} == {"ok", "skipped"}
    assert all(row["error"] <= row["error_limit"] for row in models if row["peer"] != "torchao_int8")
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "# GPU check: Dry run" in text and "dry.ffn_in" in text and "bert-toy" in text


ONLY = "gpu_check.STEPS = {name: gpu_check.STEPS[name] for name in ('names', 'environment', 'ceilings')}\n"


def test_a_broken_step_fails_the_run_and_the_others_go_on(tmp_path: Path):
    script = driver(
        tmp_path / "driver.py",
        ONLY
        + "def broken(context):\n    undefined_name\n"
        + "gpu_check.STEPS['environment'] = Step('first', 1, broken)\n",
    )
    status, rows, log = run(script, tmp_path / "out", DRY="1")
    assert status == 1, log
    assert steps(rows) == {"names": "ok", "environment": "failed", "ceilings": "ok", "summary": "ok"}
    broken = next(row for row in rows if row.get("step") == "environment")
    assert "undefined_name" in broken["reason"] and "NameError" in broken["traceback"]
    assert sum(row["kind"] == "ceiling" for row in rows) == 6


def test_a_peer_that_kills_the_process_costs_its_own_rows_only(tmp_path: Path):
    script = driver(
        tmp_path / "driver.py",
        "def measuring(context):\n"
        "    for number, peer in enumerate(('good', 'deadly', 'better', 'deadly')):\n"
        "        work = lambda: os.abort() if peer == 'deadly' else {'median_us': 1.0}\n"
        "        context.attempt(f'{number} {peer}', work, kind='probe', peer=peer)\n"
        "    return Outcome()\n"
        "def after(context):\n    return Outcome('note', 'reached')\n"
        "gpu_check.STEPS = {'linear': Step('one', 1, measuring), 'after': Step('one', 1, after)}\n",
    )
    status, rows, log = run(script, tmp_path / "out", DRY="1")
    assert status == 1, log
    assert steps(rows) == {"linear": "ok", "after": "note", "summary": "ok"}
    outcomes = [(row["kind"], row["peer"], row["status"]) for row in rows if row.get("peer")]
    assert outcomes == [
        ("probe", "good", "ok"),
        ("crash", "deadly", "crashed"),
        ("probe", "better", "ok"),
        ("probe", "deadly", "refused"),
    ]


def test_a_step_that_hangs_is_stopped_at_its_time(tmp_path: Path):
    script = driver(
        tmp_path / "driver.py",
        "import time\ngpu_check.GRACE_S = gpu_check.RESERVE_S = 0.5\n"
        "gpu_check.STEPS = {'linear': Step('one', 1, lambda context: time.sleep(600))}\n",
    )
    status, rows, log = run(script, tmp_path / "out", DRY="1", BUDGET_S="3")
    assert status == 0, log
    assert steps(rows) == {"linear": "partial", "summary": "ok"}


def test_without_a_gpu_and_not_dry_it_says_so(tmp_path: Path):
    status, rows, log = run(
        ROOT / "benchmarks" / "gpu_check.py", tmp_path, DRY="", CUDA_VISIBLE_DEVICES="", BUDGET_S="60"
    )
    assert status == 2
    assert log.splitlines()[-1] == "gpu_check: no CUDA device here; DRY=1 walks the steps on a CPU"
    assert rows == []


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("STEPS", "linear,modles", "STEPS has 'modles', expected some of build, names"),
        ("RESUME", "nowhere.jsonl", "RESUME is 'nowhere.jsonl', expected the rows.jsonl of an earlier run"),
    ],
)
def test_what_the_environment_asks_for_is_checked(monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=text):
        gpu_check.measured_before(gpu_check.Settings.read().resume)


def test_a_peer_that_is_not_installed_is_no_mistake(context: gpu_check.Context):
    def missing() -> dict:
        raise Missing("torchao does not import: no such module")

    context.settings = gpu_check.Settings(context.settings.out, True, 60.0)
    context.attempt("1 a", missing, kind="linear", peer="a")
    assert context.mistakes == 0 and rows_of(context)[0]["status"] == "refused"


def test_some_steps_alone_go_on_where_an_earlier_run_ended(tmp_path: Path):
    script = driver(
        tmp_path / "driver.py",
        "def measuring(context):\n"
        "    for peer in ('a', 'b'):\n"
        "        context.attempt(f'probe {peer}', lambda: {'median_us': 1.0}, kind='probe', peer=peer)\n"
        "    return Outcome()\n"
        "gpu_check.STEPS = {'linear': Step('one', 1, measuring), 'models': Step('one', 1, measuring)}\n",
    )
    out = tmp_path / "out"
    out.mkdir()
    before = [
        {"kind": "probe", "peer": "a", "key": "probe a", "status": "ok"},
        {"kind": "crash", "peer": "b", "key": "probe b", "status": "crashed"},
    ]
    # Where this run writes as well.
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))
    status, rows, log = run(script, out, DRY="1", STEPS="linear", RESUME=str(out / "rows.jsonl"))
    assert status == 0, log
    assert steps(rows) == {"linear": "ok", "summary": "ok"}
    assert [row["peer"] for row in rows if row["kind"] == "probe"] == ["b"]


def test_a_budget_that_is_no_number_is_one_line(tmp_path: Path):
    status, _, log = run(ROOT / "benchmarks" / "gpu_check.py", tmp_path, BUDGET_S="soon")
    assert status == 1
    assert log.splitlines() == ["gpu_check: BUDGET_S is 'soon', expected a positive number of seconds"]


@pytest.fixture
def context(tmp_path: Path) -> gpu_check.Context:
    settings = gpu_check.Settings(out=tmp_path, dry=False, budget_s=60.0)
    journal = gpu_check.Journal(settings, tmp_path, started=0.0)
    return gpu_check.Context(settings, journal, until=float("inf"), device=torch.device("cpu"))


def rows_of(context: gpu_check.Context) -> list[dict]:
    return [json.loads(line) for line in context.journal.rows_path.read_text().splitlines()]


def test_a_library_may_refuse_but_a_mistake_counts(context: gpu_check.Context):
    def refuse() -> dict:
        raise RuntimeError("self.size(0) needs to be greater than 16, but got 1\nmore lines")

    def mistake() -> dict:
        raise TypeError("unexpected keyword argument 'out_dtpye'")

    context.attempt("1 a", refuse, kind="linear", peer="a")
    assert context.mistakes == 0
    context.attempt("2 b", mistake, kind="linear", peer="b")
    assert context.mistakes == 1
    refused, wrong = rows_of(context)
    assert refused["status"] == "refused"
    assert refused["reason"] == "RuntimeError: self.size(0) needs to be greater than 16, but got 1"
    assert wrong["status"] == "error" and "out_dtpye" in wrong["traceback"]


def test_a_lost_device_ends_the_process(context: gpu_check.Context, monkeypatch: pytest.MonkeyPatch):
    def illegal(*_: object) -> dict:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def leave(status: int) -> None:
        raise SystemExit(status)

    context.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", illegal)
    monkeypatch.setattr(gpu_check.os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        context.attempt("1 a", illegal, kind="linear", peer="a")
    assert ended.value.code == gpu_check.DEVICE_LOST
    assert context.journal.marks("begin") == ["1 a"] and context.journal.marks("end") == []
    assert "illegal memory access" in context.journal.marks("lost")[0]


@pytest.mark.parametrize(
    ("tool", "status", "output", "outcome", "reason"),
    [
        ("memcheck", 0, "120 cases\n========= ERROR SUMMARY: 0 errors\n", "ok", "0 errors"),
        ("memcheck", 9, "bad write\n========= ERROR SUMMARY: 2 errors\n", "failed", "ERROR SUMMARY: 2 errors"),
        ("memcheck", 1, "ImportError: x\n========= ERROR SUMMARY: 0 errors\n", "failed", "status 1"),
        ("memcheck", 9, "========= Error: Device not supported\nERROR SUMMARY: 1 error\n", "note", "unavailable"),
        ("racecheck", 0, "120 cases\n========= RACECHECK SUMMARY: 0 hazards displayed\n", "ok", "0 hazards"),
        ("racecheck", 9, "========= RACECHECK SUMMARY: 1 hazard displayed\n", "failed", "status 9"),
        # No output of the tool: it was not the tool that ran.
        ("racecheck", 0, "120 cases\n========= ERROR SUMMARY: 0 errors\n", "failed", "status 0"),
        ("memcheck", 2, "sanitize_cuda: sparsebert._C is not built\n=====\n", "note", "_C is not built"),
        ("memcheck", None, "tile 0: right\n", "note", "last line: tile 0: right"),
    ],
)
def test_sanitizer_outcomes(context: gpu_check.Context, monkeypatch, tool, status, output, outcome, reason):
    """The CUDA kernels end so, the Triton kernels well: the worse of them counts."""
    commands = []
    clean = f"fine\n========= {gpu_check.CLEAN[tool][0]}\n"

    def ran(command: list[str], *_: object) -> tuple[int | None, str]:
        commands.append(command)
        return (status, output) if command[-1].endswith("sanitize_cuda.py") else (0, clean)

    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(gpu_check, "run_logged", ran)
    context.until = gpu_check.time.time() + 60
    found = gpu_check.every_kernel_step(context, tool)
    assert found.status == outcome and reason in found.reason and "triton: 0 " in found.reason
    assert [command[1:3] for command in commands] == [["--tool", tool]] * 3
    programs = ["sanitize_cuda.py", "sanitize_wgmma.py", "sanitize_triton.py"]
    assert [Path(command[-1]).name for command in commands] == programs


def test_no_sanitizer_is_a_note(context: gpu_check.Context, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda program: None)
    found = gpu_check.every_kernel_step(context, "memcheck")
    assert found.status == "note" and "cuda: unavailable: compute-sanitizer is not on PATH" in found.reason


def test_two_programs_share_a_log(tmp_path: Path):
    log = tmp_path / "x.log"
    for word in ("first", "second"):
        status, output = gpu_check.run_logged([sys.executable, "-c", f"print('{word}')"], log, 20.0)
        assert (status, output) == (0, f"{word}\n")
    assert log.read_text() == "first\nsecond\n"


def test_the_kernels_are_built_for_the_device_alone(context: gpu_check.Context, monkeypatch: pytest.MonkeyPatch):
    import peaks
    from sparsebert.ops.cuda import extension

    calls = []

    def built(*call: object) -> tuple[int | None, str]:
        calls.append(call)
        return status, "compiling\nlinking\n"

    status: int | None = 0
    monkeypatch.setattr(gpu_check, "run_logged", built)
    monkeypatch.setattr(extension, "refusal", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(peaks, "find_nvcc", lambda: None)
    assert gpu_check.build_step(context).status == "skipped" and not calls
    monkeypatch.setattr(peaks, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name == "pybind11" else name)
    found = gpu_check.build_step(context)
    assert (found.status, found.reason) == ("skipped", "building sparsebert._C needs pybind11") and not calls
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: name)
    assert gpu_check.build_step(context) == gpu_check.Outcome("ok", "sm_90a")
    assert calls[0][0][1:] == ["setup.py", "build_ext", "--inplace"]
    assert calls[0][3] == {"SPARSEBERT_CUDA": "1", "SPARSEBERT_CUDA_ARCHS": "90a"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert gpu_check.build_step(context).reason == "sm_86"
    # What was built may still not load here.
    monkeypatch.setattr(extension, "refusal", lambda device: "undefined symbol")
    assert gpu_check.build_step(context) == gpu_check.Outcome("failed", "undefined symbol")
    status = 1
    assert gpu_check.build_step(context) == gpu_check.Outcome("failed", "status 1: linking")
    status = None
    assert gpu_check.build_step(context).status == "partial"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert gpu_check.build_step(context).status == "skipped"


@pytest.mark.parametrize(
    ("status", "output", "outcome", "reason"),
    [
        (0, "..\n2 passed in 1.0s\n", "ok", "2 passed in 1.0s"),
        (1, "F\n1 failed in 1.0s\n", "failed", "1 failed in 1.0s"),
        (5, "no tests ran in 0.1s\n", "note", "no test is marked gpu"),
        (1, "python3: No module named pytest\n", "note", "pytest is not installed here"),
        (None, "tests/x .\n", "partial", "stopped at its time limit; last line: tests/x ."),
    ],
)
def test_pytest_outcomes(context: gpu_check.Context, monkeypatch, status, output, outcome, reason):
    monkeypatch.setattr(gpu_check, "run_logged", lambda *_: (status, output))
    found = gpu_check.pytest_step(context)
    assert (found.status, found.reason) == (outcome, reason)


def test_numbers_json_lacks_become_null(context: gpu_check.Context):
    context.attempt("1 a", lambda: {"error": float("nan"), "many": [float("inf"), 1.0]}, kind="linear", peer="a")
    (row,) = rows_of(context)
    assert row["error"] is None and row["many"] == [None, 1.0]


def test_timing_and_environment_serve_where_the_package_does_not_import(monkeypatch: pytest.MonkeyPatch):
    def broken(name: str) -> None:
        raise RuntimeError(f"{name} does not import")

    monkeypatch.setattr(gpu_check.importlib, "import_module", broken)
    found = gpu_check.load("timing").measure(lambda: None, device="cpu", budget_s=0.001)
    assert found.repeats >= 5
    assert "torch" in gpu_check.load("environment").environment("cpu")


def test_steps_share_what_time_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check.time, "time", lambda: 100.0)
    none = lambda context: gpu_check.Outcome()  # noqa: E731
    shares = {"a": 1.0, "b": 3.0, "c": 4.0}
    monkeypatch.setattr(gpu_check, "STEPS", {name: gpu_check.Step("g", share, none) for name, share in shares.items()})
    assert gpu_check.step_end(["a", "b", "c"], 0, 180.0) == 110.0
    assert gpu_check.step_end(["a", "b", "c"], 0, 180.0, count=2) == 140.0
    assert gpu_check.step_end(["a", "b", "c"], 2, 180.0) == 180.0
    assert gpu_check.step_end(["a", "b", "c"], 1, 50.0) == 100.0  # no time left: now
