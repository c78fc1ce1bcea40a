"""Work lists of measurements."""

from __future__ import annotations

import pytest

from sparsebert.bench import jobs
from sparsebert.bench.jobs import Job


def refuse() -> dict:
    raise RuntimeError("needs CUDA\nand more lines")


def test_rows_come_in_order_and_a_refusal_is_one_of_them():
    seen = []
    work = [
        Job("one a", {"kind": "linear", "peer": "a"}, lambda: {"median_us": 1.0}),
        Job("two b", {"kind": "linear", "peer": "b"}, refuse),
        Job("three a", {"kind": "linear", "peer": "a"}, lambda: {"status": "wrong", "reason": "error 1"}),
    ]
    rows = list(jobs.run(work, report=lambda *call: seen.append(call)))
    assert rows == [
        {"kind": "linear", "peer": "a", "key": "one a", "status": "ok", "median_us": 1.0},
        {"kind": "linear", "peer": "b", "key": "two b", "status": "refused", "reason": "RuntimeError: needs CUDA"},
        {"kind": "linear", "peer": "a", "key": "three a", "status": "wrong", "reason": "error 1"},
    ]
    assert seen == [(0, 3, "one a"), (1, 3, "two b"), (2, 3, "three a")]


def test_a_mistake_is_raised():
    with pytest.raises(TypeError):
        list(jobs.run([Job("a", {}, lambda: {**None})]))


def test_the_budget_ends_the_list(monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 0.0, 1.0, 2.5])
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(now))
    work = [Job(str(i), {}, dict) for i in range(9)]
    assert [row["key"] for row in jobs.run(work, budget_s=2.0)] == ["0", "1"]
