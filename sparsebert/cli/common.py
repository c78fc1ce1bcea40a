"""What the commands share: results out, errors in one line, progress bars, and how a device is named."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import torch

# progress(done, total, text): called before each piece of work.
Report = Callable[[int, int, str], None]
# What a command shows: lines of text, and tables.
Rendered = Iterable[str | Table]

_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError)
DTYPES = ("float32", "float16", "bfloat16")

# What a pipe or file gets: rich would otherwise squeeze tables into 80 columns.
_PIPE_WIDTH = 160


def execute(
    work: Callable[[Report], dict[str, Any]],
    render: Callable[[dict[str, Any]], Rendered],
    *,
    as_json: bool,
    debug: bool,
) -> None:
    """Runs one command: its result goes to stdout, all else to stderr, and an error ends the program.

    Exit codes: 1 for an error, in one line unless ``debug``, and 130 for Ctrl-C.
    """
    try:
        # Whatever a library prints must not get into the result.
        with contextlib.redirect_stdout(sys.stderr), progress_bar() as report:
            result = work(report)
    except KeyboardInterrupt as interrupt:
        # A command that has something to go on from says so.
        typer.echo(": ".join(["interrupted", *(clean(str(part)) for part in interrupt.args)]), err=True)
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc(file=sys.stderr)
        typer.echo(f"error: {one_line(error)}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(_plain(result), indent=2, allow_nan=False))
        return
    console = output()
    for part in render(result):
        console.print(Text(clean(part)) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))


def one_line(error: BaseException) -> str:
    """The message of an error, in one line that is safe to print."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return clean(f"{error.filename}: {error.strerror}")
    message = clean(" ".join(str(error).split()))
    if isinstance(error, _EXPECTED) and message:
        return message
    # Not one that a command foresaw: its type says as much as its message.
    return f"{type(error).__name__}{f': {message}' if message else ''} (sparsebert --debug shows where)"


def clean(text: str) -> str:
    """``text`` without control characters: names in a checkpoint may hold terminal escapes."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def output(*, to_stderr: bool = False) -> Console:
    """Where results go. It stays with the stdout of now, also where that is replaced later."""
    file = sys.stderr if to_stderr else sys.stdout
    console = Console(file=file, highlight=False)
    return console if console.is_terminal else Console(file=file, highlight=False, width=_PIPE_WIDTH)


@contextlib.contextmanager
def progress_bar() -> Iterator[Report]:
    """A bar on stderr that goes away at the end; nothing where stderr is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(file=sys.stderr)
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("")

    def report(done: int, total: int, text: str) -> None:
        progress.update(task, completed=done, total=total, description=clean(text))
        # Started late: a command that reports nothing shows nothing.
        progress.start()

    try:
        yield report
    finally:
        progress.stop()


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Cells are plain text; columns whose cells all start with a digit are set to the right."""
    lines = [[clean(str(cell)) for cell in row] for row in rows]
    result = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        cells = [line[i] for line in lines if line[i] not in ("", "-")]
        numbers = bool(cells) and all(cell.lstrip("+-")[:1].isdigit() for cell in cells)
        result.add_column(Text(clean(name)), justify="right" if numbers else "left", overflow="fold")
    for line in lines:
        result.add_row(*(Text(cell) for cell in line))
    return result


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def size_table(sizes: dict[str, dict[str, int]]) -> Table:
    """``encoder`` and ``model`` as ``size_report`` gives them, with or without ``memory_bytes``."""
    columns = {"on disk": "disk_bytes", "in memory": "memory_bytes"}
    shown = {name: key for name, key in columns.items() if key in sizes["model"]}
    rows = []
    for part, name in (("encoder", "encoder linears"), ("model", "whole model")):
        dense = sizes[part]["dense_bytes"]
        cells = [f"{megabytes(sizes[part][key])} ({percent(sizes[part][key], dense)})" for key in shown.values()]
        rows.append([name, megabytes(dense), *cells])
    return table(["", "dense", *shown], rows)


def few(names: Sequence[str], limit: int = 4) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def the_device(name: str | None) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``; None is the GPU where there is one. ``ValueError`` where it is not there."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}, expected cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, expected cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {name!r}, but torch finds no CUDA device here")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device is {name!r}, but torch finds only {torch.cuda.device_count()} CUDA devices here")
    return device


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: paths as text, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
