"""Retrieval pairs made of the docstrings of the Python standard library.

A docstring written to convention is a summary, a blank line and a body. The pair (summary, body) is a small
retrieval task that needs no download: find each body by its summary. The text comes from the library of the
running interpreter, read with ``ast`` and never imported, so counts differ a little between Python versions.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MINIMUM_PAIRS = 700
HELD_OUT = 500

# Installed packages are not the standard library, tests hold little prose, and the pydoc topics are one long string.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "dist-packages", "idle_test", "lib-dynload", "lib2to3", "pydoc_data",
        "site-packages", "test", "tests", "turtledemo",
    }
)  # fmt: skip
MIN_SUMMARY_WORDS, MAX_SUMMARY_LINES = 3, 3
MIN_BODY_WORDS = 12


@dataclass(frozen=True)
class Pair:
    """One docstring: `name` is module:qualified.name, `summary` its first paragraph, `body` the rest."""

    name: str
    summary: str
    body: str


@dataclass(frozen=True)
class Split:
    """Pairs for measuring and pairs for training; no text is in both."""

    evaluation: tuple[Pair, ...]
    training: tuple[Pair, ...]

    def training_texts(self) -> list[str]:
        """Every summary and body of the training pairs, in a fixed order, each once."""
        return list(dict.fromkeys(text for pair in self.training for text in (pair.summary, pair.body)))


def split_docstring(text: str) -> tuple[str, str] | None:
    """(summary, body) of a cleaned docstring, white space folded; None if it doesn't make a fair retrieval
    pair.

    Refused: no body, a summary of fewer than 3 words or more than 3 lines, a body of fewer than 12 words, and
    a body that repeats the summary word for word (it would be found by string search).
    """
    head, _, rest = text.strip().partition("\n\n")
    if len(head.splitlines()) > MAX_SUMMARY_LINES:
        return None
    summary, body = _fold(head), _fold(rest)
    if len(_words(summary)) < MIN_SUMMARY_WORDS or len(_words(body)) < MIN_BODY_WORDS:
        return None
    if _key(summary) in _key(body):
        return None
    return summary, body


def docstrings_of(source: str, module: str) -> Iterator[tuple[str, str]]:
    """(module:qualified.name, cleaned docstring) of a module and everything defined in it, in source order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library's own strings
        tree = ast.parse(source)
    pending: list[tuple[str, ast.AST]] = [("", tree)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield f"{module}:{path}", text
        inner: list[tuple[str, ast.AST]] = []
        for child in _statements(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner.append((f"{path}.{child.name}".lstrip("."), child))
            else:
                inner.append((path, child))
        pending.extend(reversed(inner))


def read_pairs(
    root: str | os.PathLike[str] | None = None, *, progress: Callable[[int, int], None] | None = None
) -> list[Pair]:
    """All pairs under `root` (default: the running interpreter's standard library), in order of file and
    line.

    The first of several pairs with the same summary or the same body is kept, so that each summary has one
    right answer. Files that are not valid UTF-8 Python are passed over. `progress` is called with (files
    done, files).

    Raises ValueError if `root` is not a folder of .py files.
    """
    folder = Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    if not folder.is_dir():
        raise ValueError(f"docstrings: {folder} is not a folder; expected the standard library's .py files there")
    pairs: list[Pair] = []
    seen: set[str] = set()
    files = list(_python_files(folder))
    for done, path in enumerate(files):
        if progress is not None:
            progress(done, len(files))
        try:
            found = list(docstrings_of(path.read_text(encoding="utf-8"), path.relative_to(folder).as_posix()))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for name, text in found:
            parts = split_docstring(text)
            if parts is None:
                continue
            keys = {_key(part) for part in parts}
            if keys & seen:
                continue
            seen |= keys
            pairs.append(Pair(name, *parts))
    if not files:
        raise ValueError(f"docstrings: no .py file under {folder}; the standard library is not there as source")
    return pairs


def split_pairs(pairs: Sequence[Pair], *, held_out: int = HELD_OUT, minimum: int = MINIMUM_PAIRS) -> Split:
    """Deterministic split: the `held_out` pairs of smallest text hash are for evaluation, the others for
    training.

    The hash depends on the text alone, so a pair falls on the same side on (nearly) every Python version and
    machine.

    Raises ValueError if there are fewer than `minimum` pairs, or no pair is left for training.
    """
    if len(pairs) < minimum:
        raise ValueError(
            f"docstrings: found {len(pairs)} pairs of summary and body, expected at least {minimum}; "
            "is this a Python without its standard library's source?"
        )
    if not 0 < held_out < len(pairs):
        raise ValueError(f"docstrings: held_out is {held_out}, expected 1 to {len(pairs) - 1} of {len(pairs)} pairs")
    ranked = sorted(pairs, key=_rank)
    return Split(tuple(ranked[:held_out]), tuple(ranked[held_out:]))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Statements and blocks right inside `node`: expressions, which are most of a tree, hold no docstrings."""
    for name in ("body", "handlers", "orelse", "finalbody", "cases"):
        inner = getattr(node, name, None)
        if isinstance(inner, list):
            yield from inner


def _python_files(folder: Path) -> Iterator[Path]:
    for current, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(current, name)


def _rank(pair: Pair) -> str:
    return hashlib.sha256(f"{pair.summary}\n{pair.body}".encode()).hexdigest()


def _fold(text: str) -> str:
    return " ".join(text.split())


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]{2,}", text)


def _key(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
