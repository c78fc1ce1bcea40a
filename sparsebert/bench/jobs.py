"""Work lists: measurements that are named before they run, so that any of them can be left out, cut off by time, or
lose its process, and the others still stand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Job", "Missing", "run"]

Row = dict[str, Any]


class Missing(RuntimeError):
    """What a peer needs is not installed here."""


@dataclass(frozen=True)
class Job:
    """One measurement. ``key`` names it and is unique in a work list, its last word the peer that is measured; ``row``
    holds the fields known beforehand, among them ``kind`` and ``peer``; ``work`` measures and returns the others.

    ``work`` raises ``RuntimeError`` where the peer cannot serve: the row then has status ``refused``. A result that
    misses its reference returns ``{"status": "wrong", "reason": ...}`` and no times.
    """

    key: str
    row: Mapping[str, Any]
    work: Callable[[], Row]


def run(
    jobs: Iterable[Job], *, budget_s: float | None = None, report: Callable[[int, int, str], None] = lambda *_: None
) -> Iterator[Row]:
    """The row of each job in order, as it is measured, until ``budget_s`` seconds have passed; ``report(done, total,
    key)`` is called before each. A refusal is a row with its ``reason``; any other error is a mistake of this package,
    and raised."""
    listed = list(jobs)
    started = time.monotonic()
    for done, job in enumerate(listed):
        if budget_s is not None and time.monotonic() - started > budget_s:
            return
        report(done, len(listed), job.key)
        try:
            result = {"status": "ok", **job.work()}
        except RuntimeError as error:
            result = {"status": "refused", "reason": first_line(error)}
        yield {**job.row, "key": job.key, **result}


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
