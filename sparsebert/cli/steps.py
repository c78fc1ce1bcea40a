"""Progress of a command that takes minutes: what it does, how far it is, and how long each part took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sparsebert.cli.common import clean

# Where nothing can be redrawn, a line of progress this often, in seconds.
REPORT_EVERY_S = 20.0


@dataclass
class Steps:
    """Shows progress of one step at a time and keeps how long each took.

    On a terminal a bar that goes away and one line that stays; elsewhere lines only, so that a log shows what is waited
    for.
    """

    console: Console
    quiet: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        started = time.perf_counter()
        live = self.console.is_terminal and not self.quiet
        lines = not (live or self.quiet)
        if lines:
            self.console.print(f"{name} ...", highlight=False)
        columns = (
            SpinnerColumn("line"),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not live) as bar:
            step = Step(bar, bar.add_task(name, total=None), self.console if lines else None, started)
            yield step
        self.seconds[name] = time.perf_counter() - started
        if not self.quiet:
            start = "  " if lines else f"{name}: "
            outcome = f"{step.outcome}, " if step.outcome else ""
            self.console.print(f"{start}{outcome}{self.seconds[name]:.1f} s", highlight=False, soft_wrap=True)


@dataclass
class Step:
    bar: Progress
    task: TaskID
    lines: Console | None
    reported: float
    outcome: str = ""

    def tick(self, done: int, total: int, text: str | None = None) -> None:
        """``done`` of ``total``; ``text`` says what is being done, in place of the step's name on a bar."""
        more: dict[str, Any] = {} if text is None else {"description": clean(text)}
        self.bar.update(self.task, completed=done, total=total, **more)
        if self.lines is not None and time.perf_counter() - self.reported > REPORT_EVERY_S:
            self.reported = time.perf_counter()
            line = f"  {done} of {total}" + (f": {clean(text)}" if text else "")
            self.lines.print(line, highlight=False, markup=False, soft_wrap=True)
