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

import gpu_check  # noqa: E402

STEPS = [
    *("build", "names", "environment", "ceilings", "peaks", "pytest", "linear", "models", "compile"),
    *("sanitizer", "memcheck", "racecheck", "summary"),
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
    assert {row["status"] for row in linears} == {"ok", "skipped"}
    for row in linears:
        # A skipped peer was walked with stand-ins and its result compared all the same.
        assert row["error"] <= row["error_limit"]
        assert row["flops"] == 2 * row["tokens"] * row["out_features"] * row["in_features"]
        assert row["bytes"] > row["weight_bytes"] > 0
        assert ("median_us" in row) == (row["status"] == "ok")
    peers = {peer.name for _, _, peer in gpu_check_jobs()}
    assert {row["peer"] for row in linears} == peers
    assert {row["peer"] for row in linears if row["status"] == "skipped"} == {
        *("cusparselt_fp16", "cusparselt_bf16", "cusparselt_int8", "cusparselt_int8_gelu"),
        *("cusparselt_fp8", "cutlass_fp16"),
    }
    searched = [row for row in linears if row["peer"] == "cusparselt_fp16" and row["tokens"] == 1]
    assert all(row["padded_tokens"] == 8 for row in searched)

    models = {row["peer"]: row["status"] for row in rows if row["kind"] == "model"}
    assert models == {"dense_eager": "ok", "dense_graph": "skipped", "dense_compiled": "ok"}
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "# GPU check: Dry run" in text and "bert-base" in text


def gpu_check_jobs():
    import baselines

    return baselines.jobs(dry=True)


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


def test_a_budget_that_is_no_number_is_one_line(tmp_path: Path):
    status, _, log = run(ROOT / "benchmarks" / "gpu_check.py", tmp_path, BUDGET_S="soon")
    assert status == 1
    assert log.splitlines() == ["gpu_check: BUDGET_S is 'soon', expected a positive number of seconds"]


@pytest.fixture
def context(tmp_path: Path) -> gpu_check.Context:
    torch = pytest.importorskip("torch")
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
    import torch

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
    ("status", "output", "outcome", "reason"),
    [
        (0, "ran\n========= ERROR SUMMARY: 0 errors\n", "ok", "0 errors"),
        (9, "bad write\n========= ERROR SUMMARY: 2 errors\n", "failed", "ERROR SUMMARY: 2 errors"),
        (1, "ImportError: x\n========= ERROR SUMMARY: 0 errors\n", "failed", "status 1"),
        (9, "========= Error: Device not supported\nERROR SUMMARY: 1 error\n", "note", "unavailable"),
        (None, "", "note", "unavailable"),
    ],
)
def test_sanitizer_outcomes(context: gpu_check.Context, monkeypatch, status, output, outcome, reason):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(gpu_check, "run_logged", lambda *_: (status, output))
    found = gpu_check.sanitizer_step(context)
    assert found.status == outcome and reason in found.reason


def test_no_sanitizer_is_a_note(context: gpu_check.Context, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda program: None)
    found = gpu_check.sanitizer_step(context)
    assert (found.status, found.reason) == ("note", "unavailable: compute-sanitizer is not on PATH")


@pytest.mark.parametrize(
    ("tool", "status", "output", "outcome", "reason"),
    [
        ("memcheck", 0, "120 cases\n========= ERROR SUMMARY: 0 errors\n", "ok", "0 errors"),
        ("racecheck", 0, "120 cases\n========= RACECHECK SUMMARY: 0 hazards displayed\n", "ok", "0 hazards"),
        ("racecheck", 9, "========= RACECHECK SUMMARY: 1 hazard displayed\n", "failed", "status 9"),
        # No output of the tool: it was not the tool that ran.
        ("racecheck", 0, "120 cases\n========= ERROR SUMMARY: 0 errors\n", "failed", "status 0"),
        ("memcheck", 2, "sanitize_cuda: sparsebert._C is not built\n=====\n", "note", "_C is not built"),
        ("memcheck", None, "tile 0: right\n", "note", "last line: tile 0: right"),
    ],
)
def test_every_kernel_outcomes(context: gpu_check.Context, monkeypatch, tool, status, output, outcome, reason):
    commands = []
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(gpu_check, "run_logged", lambda command, *_: (commands.append(command), (status, output))[1])
    found = gpu_check.every_kernel_step(context, tool)
    assert found.status == outcome and reason in found.reason
    assert commands[0][1:3] == ["--tool", tool] and commands[0][-1].endswith("sanitize_cuda.py")


def test_the_kernels_are_built_for_the_device_alone(context: gpu_check.Context, monkeypatch: pytest.MonkeyPatch):
    import torch

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


@pytest.mark.parametrize(("fault", "status"), [(0.0, "ok"), (0.01, "wrong"), (float("nan"), "wrong")])
def test_a_wrong_result_is_not_timed(context: gpu_check.Context, monkeypatch, fault: float, status: str):
    import torch

    import baselines

    def build(case: baselines.Case) -> baselines.Built:
        x, w, b = case.operands(torch.float16)

        def call() -> torch.Tensor:
            y = torch.nn.functional.linear(x, w, b)
            y[-1, -1] += fault * y.float().norm()
            return y

        reference = x.double() @ w.double().T + b.double()
        return baselines.Built({"": [call, call]}, lambda: reference, 1, 1, limit=2e-3)

    peer = baselines.Peer("suspect", "float16", "bias", build)
    monkeypatch.setattr(baselines, "jobs", lambda dry: [(baselines.DRY_SHAPES[0], 16, peer)])
    assert gpu_check.linear_step(context).status == "ok"
    (row,) = rows_of(context)
    assert row["status"] == status
    assert ("median_us" in row) == (status == "ok")
    assert ("over the limit" in row.get("reason", "")) == (status == "wrong")


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


def test_jobs_start_with_what_tells_most():
    import baselines

    jobs = baselines.jobs(dry=False)
    names = [(shape.role, tokens, peer.name) for shape, tokens, peer in jobs]
    assert len(set(names)) == len(names)
    first = names[:24]
    assert {tokens for _, tokens, _ in first} == {128, 2048, 8192}
    assert {peer for _, _, peer in first} == {"cublas_fp16", "cusparselt_fp16"}
    assert all(".ffn" in role for role, _, _ in first)
    shapes = {(shape.out_features, shape.in_features) for shape, _, _ in jobs}
    assert shapes == {
        *((768, 768), (2304, 768), (3072, 768), (768, 3072)),
        *((1024, 1024), (3072, 1024), (4096, 1024), (1024, 4096)),
    }
    assert {tokens for _, tokens, _ in jobs} == {1, 16, 32, 128, 512, 2048, 8192, 16384}
    # Then the package's own kernels, first where packed weights pay by their bytes, beside dense.
    served = sum(peer.serves(shape) for shape in baselines.FEED_FORWARD for peer in baselines.OWN)
    after = names[24 : 24 + 4 * 2 + served]
    assert {tokens for _, tokens, _ in after} == {32}
    own = {peer.name for peer in baselines.OWN}
    assert {peer for _, _, peer in after} == {"cublas_fp16", "cusparselt_fp16", *own}
    # And the CUDA kernel with what it is held against.
    rest, held = names[24 + len(after) :], {peer.name for peer in baselines.CUDA + baselines.RIVALS}
    assert {peer for _, _, peer in rest[: 3 * 4 * len(held)]} == held
    assert {tokens for _, tokens, _ in rest[3 * 4 * len(held) : 4 * 4 * len(held)]} == {512}
    every = {1, 16, 32, 128, 512, 2048, 8192, 16384}
    for peer in baselines.CUDA:
        assert {tokens for _, tokens, name in names if name == peer.name} == every


@pytest.mark.parametrize("peer", ["cuda_nm24_fp16", "cuda_int8_nm24_gelu", "cuda_int8_nm24_to_int8"])
def test_many_configurations_are_sifted_before_they_are_measured(context: gpu_check.Context, monkeypatch, peer: str):
    """On a GPU a peer of the CUDA kernel has a variant for each; here the one there is stands for twelve."""
    import baselines

    (found,) = (each for each in baselines.CUDA if each.name == peer)

    def build(case: baselines.Case) -> baselines.Built:
        built = found.build(case)
        assert list(built.variants) == [""]
        built.variants = {f"tile={number}": built.variants[""] for number in range(12)}
        return built

    many = baselines.Peer(peer, found.dtype, found.epilogue, build)
    context.settings = gpu_check.Settings(context.settings.out, True, 60.0)
    monkeypatch.setattr(baselines, "jobs", lambda dry: [(baselines.DRY_SHAPES[0], 16, many)])
    assert gpu_check.linear_step(context).status == "ok"
    (row,) = rows_of(context)
    assert row["status"] == "ok" and len(row["variants_us"]) == 12 and row["algorithm"].startswith("tile=")
    assert row["resident_us"] > 0 and row["median_us"] == row["variants_us"][row["algorithm"]]


def test_pruning_keeps_the_two_largest_of_four():
    import torch

    import baselines

    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, -1.0, -2.0, 0.5, 0.25]])
    assert baselines.prune_2_4(weight).tolist() == [[0.0, -4.0, 3.0, 0.0, -1.0, -2.0, 0.0, 0.0]]


def test_every_name_the_steps_use_exists_and_a_missing_one_is_found(monkeypatch: pytest.MonkeyPatch):
    import baselines

    assert baselines.missing_names() == []
    monkeypatch.setitem(baselines.OPERATORS, "aten::_int_mm", ("self", "mat3"))
    monkeypatch.setitem(baselines.OPERATORS, "aten::_no_such_mm", ("self",))
    monkeypatch.setattr(baselines, "ATTRIBUTES", ("torch.cuda.CUDAGrap",))
    assert baselines.missing_names() == [
        "aten::_int_mm: no argument named mat3",
        "aten::_no_such_mm: no such operator",
        "torch.cuda.CUDAGrap: no such name",
    ]
