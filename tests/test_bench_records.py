"""Runs on disk: what is written, read, refused and kept."""

from __future__ import annotations

import json

import pytest

import bench_rows
from bench_rows import CPU_RECORD, RECORD, linear, run_file
from sparsebert.bench import records

ROWS = [linear("cublas_fp16", 128, 10.0), linear("cublas_fp16", 512, 20.0)]


def test_what_is_written_is_read_with_its_record_first(tmp_path):
    file = tmp_path / "run.jsonl"
    written = records.write(file, RECORD, iter([*ROWS, {"kind": "peak", "error": float("nan")}]))
    first, *others = (json.loads(line) for line in file.read_text().splitlines())
    assert first["kind"] == "environment" and first["record"] == RECORD
    assert {row["environment"] for row in [first, *others]} == {records.identity(RECORD)}
    assert all(row["dry"] is False and row["at_s"] >= 0 for row in others)
    run = records.read(file)
    assert run == written and run.record == RECORD
    assert [row["tokens"] for row in run.of("linear")] == [128, 512]
    assert run.of("peak")[0]["error"] is None
    assert (run.label, run.day, run.commit) == ("Test GPU", "2020-01-02", "0123456")
    with pytest.raises(FileExistsError):
        records.write(file, RECORD, ROWS)


def test_rows_stand_as_they_came_when_the_next_one_fails(tmp_path):
    def rows():
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write(tmp_path / "run.jsonl", RECORD, rows())
    assert len(records.read(tmp_path / "run.jsonl").rows) == 1


def test_of_one_measurement_the_last_counts(tmp_path):
    file = run_file(tmp_path / "run.jsonl", [*ROWS, linear("cublas_fp16", 128, 11.0)])
    assert [(row["tokens"], row["median_us"]) for row in records.read(file).rows] == [(512, 20.0), (128, 11.0)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": \n', "line 3: is no JSON"),
        ('{"kind": "peak", "dry": false, "environment": null, "x": NaN}\n', "line 3: is no JSON"),
        ("[1]\n", "line 3: is no row"),
        ('{"kind": "peak"}\n', "line 3: is no row, which has kind, dry and environment"),
        ('{"kind": "environment", "dry": false, "environment": "a"}\n', "line 3: is an environment row without"),
        ('{"kind": "peak", "dry": false, "environment": "abc"}\n', "line 3: is of environment abc, the file's is "),
        (
            bench_rows.lines([], {**RECORD, "driver": "9"}),
            "line 3: is of another environment than the file's: driver '9'",
        ),
        (json.dumps({**ROWS[0], "mode": "cpu-wall", "dry": False, "environment": None}), "record of a GPU, Test GPU"),
    ],
)
def test_what_is_no_run_is_refused_with_its_line(tmp_path, text, complaint):
    file = run_file(tmp_path / "run.jsonl", ROWS[:1])
    file.write_text(file.read_text() + text)
    with pytest.raises(ValueError, match="run.jsonl") as error:
        records.read(file)
    assert complaint in str(error.value)


def test_a_file_without_an_environment_is_refused(tmp_path):
    file = tmp_path / "run.jsonl"
    file.write_text(json.dumps({**ROWS[0], "dry": False, "environment": None}) + "\n")
    with pytest.raises(ValueError, match=r"run\.jsonl: has no environment row"):
        records.read(file)


def test_rows_from_before_the_environment_was_known_belong_to_it(tmp_path):
    file = tmp_path / "run.jsonl"
    early = json.dumps({"kind": "step", "dry": False, "environment": None})
    file.write_text(early + "\n" + bench_rows.lines(ROWS))
    assert [row["kind"] for row in records.read(file).rows] == ["step", "linear", "linear"]


def test_no_dry_run_bears_the_name_of_a_gpu(tmp_path):
    run = records.read(run_file(tmp_path / "run.jsonl", ROWS, dry=True))
    assert run.dry and not run.on_gpu and "Test GPU" not in run.label
    run = records.read(run_file(tmp_path / "cpu.jsonl", ROWS, CPU_RECORD))
    assert run.label == "CPU: Test CPU (2 threads)" and not run.on_gpu


def test_a_run_is_kept_by_gpu_day_and_commit(tmp_path):
    file = run_file(tmp_path / "run.jsonl", ROWS)
    kept = records.keep(file, tmp_path / "data")
    assert kept == tmp_path / "data" / "test-gpu" / "2020-01-02-0123456.jsonl"
    assert kept.read_text() == file.read_text()
    cpu = records.keep(run_file(tmp_path / "cpu.jsonl", ROWS, CPU_RECORD), tmp_path / "data")
    assert cpu.parent.name == "cpu-test-cpu-2-threads"
    record = {**RECORD, "gpu": "NVIDIA H100 80GB HBM3"}
    assert records.place(records.Run(file, record, ()), tmp_path).parent.name == "nvidia-h100-80gb-hbm3"


def test_a_kept_file_grows_by_rows_of_the_same_environment_alone(tmp_path):
    data = tmp_path / "data"
    kept = records.keep(run_file(tmp_path / "a.jsonl", ROWS[:1]), data)
    # The same machine and commit, an hour later.
    later = {**RECORD, "measured": "2020-01-02T04:00:00+00:00"}
    assert records.keep(run_file(tmp_path / "b.jsonl", ROWS[1:], later), data) == kept
    assert len(records.read(kept).rows) == 2
    before = kept.read_text()
    records.keep(run_file(tmp_path / "b.jsonl", ROWS[1:], later), data)
    assert kept.read_text() == before
    other = run_file(tmp_path / "c.jsonl", ROWS, {**RECORD, "driver": "9", "torch": "3.0"})
    with pytest.raises(ValueError, match="driver '9' and not '1.2', torch '3.0' and not '2.0'"):
        records.keep(other, data)
    assert kept.read_text() == before
    assert [file.name for file in data.rglob("*.*")] == [kept.name]


@pytest.mark.parametrize(
    ("change", "dry", "rows", "complaint"),
    [
        ({}, True, ROWS, "is a dry run"),
        ({"dirty": True}, False, ROWS, "a checkout with changes to 0123456"),
        ({"commit": "unknown"}, False, ROWS, "its commit is 'unknown'"),
        ({"commit": None}, False, ROWS, "its commit is None"),
        ({"commit": "../../../x"}, False, ROWS, "its commit is"),
        ({"measured": None}, False, ROWS, "the day of its measurement is None"),
        ({}, False, [], "holds no row"),
    ],
)
def test_what_is_not_kept(tmp_path, change, dry, rows, complaint):
    file = run_file(tmp_path / "run.jsonl", rows, {**RECORD, **change}, dry=dry)
    with pytest.raises(ValueError, match=complaint):
        records.keep(file, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_changes_are_kept_where_that_is_asked_for(tmp_path):
    file = run_file(tmp_path / "run.jsonl", ROWS, {**RECORD, "dirty": True})
    assert records.keep(file, tmp_path / "data", force=True).exists()
