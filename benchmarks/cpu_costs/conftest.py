"""What the suite's tests share: calls measured in turns, bounds that their ratios have to keep, a table of these."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch

from sparsebert.bench.environment import environment
from sparsebert.bench.timing import measure_together

ROWS = pytest.StashKey[list[dict[str, Any]]]()
TABLE = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="of torch; 1 unless named: more wait for each other")
    parser.addoption("--ratios", metavar="FILE", help="where to write the ratios as JSON lines, the machine first")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[TABLE] = [], []
    torch.set_num_threads(config.getoption("--threads", default=1))


@pytest.fixture
def in_turns(benchmark: Any) -> Callable[..., dict[str, float]]:
    """``in_turns(calls, budget_s)``: the median microseconds of each call, A B A B ..., in one run."""

    def measure(
        calls: Mapping[str, Callable[[], object]], budget_s: float, warmup: int = 3, min_repeats: int = 5
    ) -> dict[str, float]:
        if not benchmark.enabled:
            # The calls only have to run.
            budget_s, warmup, min_repeats = 0.0, 1, 1
        timings = measure_together(calls, device="cpu", budget_s=budget_s, warmup=warmup, min_repeats=min_repeats)
        return {name: timing.median_us for name, timing in timings.items()}

    return measure


@pytest.fixture
def above(benchmark: Any) -> Callable[..., float]:
    """``above(call, other, budget_s)``: the median, in microseconds, of what one call takes more than the one right
    beside it; each comes first in every second pair. Two medians of calls of 200 us differ by more than that by chance,
    where other programs run."""

    def measure(call: Callable[[], object], other: Callable[[], object], budget_s: float) -> float:
        until = time.perf_counter() + (budget_s if benchmark.enabled else 0.0)
        differences: list[float] = []
        for _ in range(20):
            call(), other()
        while not differences or time.perf_counter() < until:
            times = [_seconds(each) for each in (call, other, other, call)]
            differences += [times[0] - times[1], times[3] - times[2]]
        return statistics.median(differences) * 1e6

    return measure


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Ratio(NamedTuple):
    """A number that follows from times of one run, and its bound."""

    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None
    unit: str = "x"

    @property
    def met(self) -> bool:
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    def __str__(self) -> str:
        bound = f"at most {self.at_most:g}" if self.at_least is None else f"at least {self.at_least:g}"
        return f"{'met' if self.met else 'MISSED':6}  {self.value:8.2f} {self.unit:2}  {bound:11}  {self.name}"


@pytest.fixture
def bounded(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``bounded(us, ratio, ...)``: keeps the times ``us`` of a run and the ratios that follow from them, each the
    arguments of ``Ratio``, in ``extra_info`` and for the table; fails where one misses its bound."""

    def check(us: Mapping[str, float], *ratios: dict[str, Any]) -> None:
        if not benchmark.enabled:
            return
        found = [Ratio(**ratio) for ratio in ratios]
        rows = [
            {**ratio, "value": round(ratio["value"], 3), "met": r.met} for ratio, r in zip(ratios, found, strict=True)
        ]
        row = {"ratios": rows, "us": {call: round(time, 2) for call, time in us.items()}}
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)
        request.config.stash[TABLE].extend(map(str, found))
        if missed := [str(ratio) for ratio in found if not ratio.met]:
            pytest.fail("\n".join(missed), pytrace=False)

    return check


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if table := config.stash[TABLE]:
        terminalreporter.section("ratios")
        for line in table:
            terminalreporter.write_line(line)
    if file := config.getoption("--ratios", default=None):
        with open(file, "w") as lines:
            for row in ({"environment": environment()}, *config.stash[ROWS]):
                lines.write(json.dumps(row) + "\n")
