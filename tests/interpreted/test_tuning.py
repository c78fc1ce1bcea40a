"""``sb.tune`` over the configurations of Triton's kernels, which the interpreter runs on a CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import sparsebert as sb
from sparsebert.kernels import nm_linear as kernel
from sparsebert.ops import measurements, select


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    monkeypatch.setenv(measurements.ENVIRONMENT_VARIABLE, str(tmp_path))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 24)).half()
    sb.compress_(model, {"*": sb.NMConfig(2, 4)})
    with sb.backend("triton"):
        timings = []

        def measure_together(calls, **options):
            """The last of the configurations, and ``neutral`` of the layouts, is quickest."""
            for call in (part for parts in calls.values() for part in parts):
                call()
            slowest = len(calls)
            timings.append(slowest)
            return {name: timing(slowest - i) for i, name in enumerate(calls)}

        monkeypatch.setattr("sparsebert.tuning.measure_together", measure_together)
        report = sb.tune(model, [4])
    return model, report, timings


def timing(us):
    from sparsebert.bench.timing import Timing

    return Timing.from_samples([float(us)], "cpu-wall")


def test_every_configuration_runs_and_the_quickest_is_recorded_and_used(tuned, monkeypatch):
    model, report, timings = tuned
    problem = model[0].problem(4)._replace(layout="neutral")
    (candidate,) = (c for c in select.candidates("nm_linear", "neutral") if c.backend == "triton")
    found = select.solutions(candidate, problem)
    # A comparison of all configurations, then one of the layouts that Triton serves.
    assert timings == [len(found), 1] and len(found) > 8
    (row,) = measurements.load()
    assert (row.layout, row.backend, row.source) == ("neutral", "triton", "measured")
    assert row.configuration == found[-1].configuration._asdict()
    assert "measured" in report.rows[0].kernels["neutral"]

    used = []
    run = kernel.nm_linear
    monkeypatch.setattr(
        kernel, "nm_linear", lambda *args, **options: used.append(options["config"]) or run(*args, **options)
    )
    model[0].prepare_("neutral")
    x = torch.randn(4, 256).half()
    for tokens in (4, 3, 5):
        with sb.backend("triton"):
            model(x[:1].expand(tokens, -1))
    # Three tokens are in the bucket of four; five are in another, which was not measured.
    assert used[:2] == [found[-1].configuration] * 2 and used[2] != found[-1].configuration
    assert used[2] == candidate.configurations(problem._replace(tokens=5))[0]


def test_explain_says_what_a_configuration_rests_on(tuned):
    model, *_ = tuned
    model[0].prepare_("neutral")
    assert ": measured" in sb.explain(model, tokens=4).layers[0].kernel
    assert ": estimated" in sb.explain(model, tokens=64).layers[0].kernel


def test_another_process_uses_what_was_measured(tuned):
    model, *_ = tuned
    (row,) = measurements.load()
    program = (
        "import torch, sparsebert as sb\n"
        "m = torch.nn.Sequential(torch.nn.Linear(256, 24)).half()\n"
        "sb.compress_(m, {'*': sb.NMConfig(2, 4)})\n"
        "m[0].prepare_('neutral')\n"
        "print(sb.explain(m, tokens=4).layers[0].kernel)\n"
    )
    kernel = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    for name, value in row.configuration.items():
        assert f"{name} {value}" in kernel
    assert ": measured" in kernel


def test_a_configuration_that_is_no_more_is_not_used(tuned):
    model, *_ = tuned
    (row,) = measurements.load()
    measurements.record([measurements.Row(**{**vars(row), "configuration": {**row.configuration, "block_m": 48}})])
    model[0].prepare_("neutral")
    assert ": estimated" in sb.explain(model, tokens=4).layers[0].kernel
