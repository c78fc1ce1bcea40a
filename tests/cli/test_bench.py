"""``sparsebert bench`` with stand-ins for what measures."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import bench_rows
from bench_rows import RECORD, linear, model, own, run_file
from sparsebert.bench import records
from sparsebert.bench.jobs import Job
from sparsebert.bench.linear import ceilings, sweep
from sparsebert.bench.models import ladder
from sparsebert.bench.report import page
from sparsebert.cli.app import app

KNOWN = ("key", "status", "median_us", "mad_us", "mode", "reason")


def job(row: dict, *, fails: bool = False) -> Job:
    """A job that gives ``row`` as a CPU would."""

    def work() -> dict:
        if fails:
            raise RuntimeError("no kernel here")
        return {"median_us": row["median_us"], "mad_us": row["mad_us"], "mode": "cpu-wall"}

    return Job(row["key"], {name: value for name, value in row.items() if name not in KNOWN}, work)


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> dict[str, tuple[tuple, dict]]:
    """Stands in for the lists of work; what each was asked for."""
    seen = {}

    def stand_in(module: ModuleType, jobs: list[Job]) -> None:
        def listed(*arguments, **options):
            seen[module.__name__.rpartition(".")[2]] = (arguments, options)
            if options.get("peers") == ["nothing"]:
                raise ValueError("no peer matches nothing")
            return [] if options.get("rungs") == ["nothing"] else jobs

        monkeypatch.setattr(module, "jobs", listed)

    roof = {"kind": "ceiling", "peer": "copy"}
    layers = [job(linear("cublas_fp32", 128, 10.0)), job(own(128, 5.0)), job(own(128, 1.0, format="int8"), fails=True)]
    stand_in(ceilings, [Job("copy", roof, lambda: {"gbps": 10.0, "median_us": 1.0, "mode": "cpu-wall"})])
    stand_in(sweep, layers)
    stand_in(ladder, [job(model("eager_fp32", 4000.0)), job(model("2:4", 2000.0, format="2:4"))])
    return seen


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_ops_writes_a_run_and_prints_the_short_table(tmp_path, calls):
    file = tmp_path / "run.jsonl"
    options = ("--shapes", "base,minilm", "--tokens", "1,128", "--peers", "cublas_*,own*", "--budget", "60")
    result = run("ops", "--device", "cpu", "--out", file, *options)
    assert result.exit_code == 0, result.stderr
    (device,), given = calls["sweep"]
    assert device.type == "cpu"
    assert given == {
        "models": ["base", "minilm"],
        "tokens": [1, 128],
        "peers": ["cublas_*", "own*"],
        "ceilings": {"copy": 10.0},
    }
    text = result.stdout
    assert text.startswith(page.CPU_NOTE) and "Linear layers on CPU: " in text
    assert "2:4" in text and "mma_sp, cuda" in text and "2.00x" in text and "no kernel here" in text
    found = records.read(file)
    assert [row["kind"] for row in found.rows] == ["ceiling", "linear", "linear", "linear"]
    assert found.record["gpu"] is None and found.label.startswith("CPU: ")
    assert found.rows[-1]["status"] == "refused"


def test_model_writes_a_run_and_prints_the_ladder(tmp_path, calls):
    file = tmp_path / "run.jsonl"
    options = ("--models", "bert-base,bert-large", "--batch", "1,8", "--length", "128", "--rungs", "eager*")
    result = run("model", "--device", "cpu", "--out", file, "--no-compiled", *options, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["on_gpu"] is False and found["device"].startswith("CPU: ") and found["file"] == str(file)
    assert [row["peer"] for row in found["rows"]] == ["eager_fp32", "2:4"]
    _, given = calls["ladder"]
    assert given == {
        "models": ["bert-base", "bert-large"],
        "batches": [1, 8],
        "lengths": [128],
        "rungs": ["eager*"],
        "compiled": False,
    }
    result = run("model", "--device", "cpu", "--out", tmp_path / "other.jsonl")
    assert page.CPU_NOTE in result.stdout and "2.00x" in result.stdout


def test_a_run_gets_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("ops", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("bench-ops-") and file.name in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ops", "--out", "there.jsonl"), "error: there.jsonl: is there already"),
        (("model", "--out", "no/run.jsonl"), "error: no/run.jsonl: there is no folder no"),
        (("ops", "--peers", "nothing"), "error: no peer matches nothing"),
        (("model", "--rungs", "nothing"), "error: there is nothing to measure: no rung is left of nothing"),
        (("ops", "--tokens", "1,zero"), "is not a list of positive numbers"),
        (("model", "--batch", "0"), "is not a list of positive numbers"),
        (("ops", "--shapes", "huge"), "'huge' is not one of base, large, minilm"),
        (("ops", "--device", "tpu"), "is not a device"),
        (("report", "there.jsonl", "--out", "out"), "error: there.jsonl: has no environment row"),
        (("report", "no.jsonl", "--out", "out"), "error: no.jsonl: No such file"),
    ],
)
def test_what_cannot_be_measured_is_one_line(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("there.jsonl").touch()
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert [file.name for file in tmp_path.iterdir()] == ["there.jsonl"]


def test_what_was_measured_before_ctrl_c_stays(tmp_path, monkeypatch):
    def stop() -> dict:
        raise KeyboardInterrupt

    listed = [job(linear("cublas_fp32", 128, 10.0)), Job("x", {"kind": "linear", "peer": "x"}, stop)]
    monkeypatch.setattr(sweep, "jobs", lambda *_, **__: listed)
    file = tmp_path / "run.jsonl"
    result = run("ops", "--device", "cpu", "--out", file)
    assert result.exit_code == 130 and f"interrupted: what was measured is in {file}" in result.stderr
    assert [row["kind"] for row in records.read(file).rows] == ["ceiling", "linear"]


def test_report_writes_a_page_and_its_plots(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [linear("cublas_fp16", 128, 10.0), own(128, 5.0)]
    gpu = run_file(tmp_path / "gpu.jsonl", rows)
    cpu = run_file(tmp_path / "cpu.jsonl", rows, bench_rows.CPU_RECORD)
    out = tmp_path / "report"
    result = run("report", gpu, cpu, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "measured on Test GPU; CPU: Test CPU (2 threads)" in result.stdout
    text = (out / "report.md").read_text()
    assert text.index("## Test GPU") < text.index("## CPU: Test CPU") < text.index(page.CPU_NOTE)
    assert [file.name for file in out.iterdir()] == ["report.md"] and "![" not in text
    result = run("report", gpu, "--out", out, "--plots", "--json")
    text = (out / "report.md").read_text()
    names = {f"test-gpu-{name}.{kind}" for name in ("speed-up", "break-even") for kind in ("svg", "png")}
    assert {Path(file).name for file in json.loads(result.stdout)["files"]} == {"report.md", *names}
    assert "(test-gpu-speed-up.svg)" in text and RECORD["gpu"] in text
