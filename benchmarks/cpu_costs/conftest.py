"""What the suite's tests share: calls measured in turns, bounds that their ratios have to keep, a table of these."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from sparsebert.bench.environment import environment
from sparsebert.bench.timing import measure_together

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="of torch; 1 unless named: more wait for each other")
    parser.addoption("--ratios", metavar="FILE", help="where to write the ratios as JSON lines, the machine first")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    torch.set_num_threads(config.getoption("--threads", default=1))


@pytest.fixture
def in_turns(benchmark: Any) -> Callable[..., dict[str, float]]:
    """``in_turns(calls, budget_s)``: the median microseconds of each call, A B A B ..., in one run."""

    def measure(calls: Mapping[str, Callable[[], object]], budget_s: float) -> dict[str, float]:
        # Under --benchmark-disable the calls only have to run.
        once = {"budget_s": 0.0, "warmup": 1, "min_repeats": 1}
        timings = measure_together(calls, device="cpu", **({"budget_s": budget_s} if benchmark.enabled else once))
        return {name: timing.median_us for name, timing in timings.items()}

    return measure


@pytest.fixture
def bounded(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``bounded(name, us, value, at_most=..., at_least=..., unit=...)``: fails where ``value``, which follows from the
    times ``us`` of one run, is out of bounds; either way it is kept, in ``extra_info`` and for the table."""

    def check(
        name: str,
        us: Mapping[str, float],
        value: float,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        unit: str = "x",
        **more: Any,
    ) -> None:
        if not benchmark.enabled:
            return
        met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        bound = f"at most {at_most:g}" if at_least is None else f"at least {at_least:g}"
        row = {"ratio": name, "value": round(value, 2), "unit": unit, "bound": bound, "met": met, **more}
        row["us"] = {call: round(time, 2) for call, time in us.items()}
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)
        if not met:
            pytest.fail(_line(row), pytrace=False)

    return check


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("ratios")
        for row in rows:
            terminalreporter.write_line(_line(row))
    if file := config.getoption("--ratios", default=None):
        with open(file, "w") as lines:
            for row in ({"environment": environment()}, *rows):
                lines.write(json.dumps(row) + "\n")


def _line(row: Mapping[str, Any]) -> str:
    verdict = "met" if row["met"] else "MISSED"
    return f"{verdict:6}  {row['value']:8.2f} {row['unit']:2}  {row['bound']:12}  {row['ratio']}"
