"""benchmarks/training.py runs for every method, and no method holds more than it may."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import training  # noqa: E402
from sparsebert.methods import METHODS  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_method_is_measured(capsys):
    assert training.main(["--smoke"]) == 0
    printed = capsys.readouterr()
    first, *rows = map(json.loads, printed.out.splitlines())
    assert first["smoke"] and first["environment"]["torch"] == torch.__version__
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert row["steps"] == 30
        assert row["spread"][0] <= row["ratio"] <= row["worst"] == row["spread"][-1]
        # Of a tiny model it may come out below zero by noise, but where there is none it is exactly that.
        assert (row["step_ms"]["distillation"] != 0) == bool(training.CASES[row["method"]].distils)
        # Times mean nothing at this size, bytes do.
        assert row["floats_within_bound"], row
        assert row["peak_floats"] is None
    assert len(printed.err.splitlines()) == 1 + len(METHODS)


def test_bytes_held_are_counted_once_and_without_the_teacher():
    model = torch.nn.Linear(4, 4, bias=False)
    teacher = torch.nn.Linear(100, 100)
    plain = training.Training(model, None, 1, None)
    assert plain.held_bytes(besides=None) == 64
    model.weight.grad = torch.zeros(4, 4)
    assert plain.held_bytes(besides=None) == 128
    mask = torch.ones(4, 4, dtype=torch.bool)

    class Holder:
        __module__ = "sparsebert.methods.some"

    plain.run = Holder()  # type: ignore[assignment]
    plain.run.__dict__.update(model=model, teacher=teacher, state={"mask": {"a": mask, "b": mask[:2]}})
    assert plain.held_bytes(besides=teacher) == 128 + 16
    assert plain.held_bytes(besides=None) > 128 + 16 + 40_000


def test_an_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        training.main(["--smoke", "--methods", "magic"])
    assert "no case for magic; there are magnitude" in capsys.readouterr().err
