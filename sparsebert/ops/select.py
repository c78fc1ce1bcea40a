"""Which kernel runs a held layout: an ordered table of candidates an op, each able to say why it refuses.

The candidate that ``sb.tune`` found fastest on this device runs, in the configuration that it was measured in; without
a measurement the first that serves and does not wait for one, in the configuration it estimates. ``with
sb.backend("triton"):`` or ``SPARSEBERT_BACKEND=triton`` forces one; where it cannot serve, that is an error and never a
silent fallback. The variable is read when sparsebert is imported. Nothing is ever measured during a call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from sparsebert.ops import measurements
from sparsebert.ops.devices import Device, describe

BACKENDS = ("cuda", "triton", "torch", "reference")
ENVIRONMENT_VARIABLE = "SPARSEBERT_BACKEND"

_environment = os.environ.get(ENVIRONMENT_VARIABLE) or None
if _environment is not None and _environment not in BACKENDS:
    raise ValueError(f"{ENVIRONMENT_VARIABLE} is {_environment!r}, expected one of {', '.join(BACKENDS)}")

_forced: ContextVar[str | None] = ContextVar("sparsebert_backend", default=None)
# Contexts open in any thread: lets a module know without a look-up that nobody forces anything.
_open_contexts = 0


class Problem(NamedTuple):
    """All that a candidate may look at to accept or refuse one call. ``dtype`` is that of x, ``spec`` one of
    ``ops.specs``, and ``tokens`` counts rows of x."""

    layout: str
    device: Device
    dtype: torch.dtype
    spec: Any
    tokens: int
    activation: str

    @property
    def op(self) -> str:
        return self.spec.op

    @property
    def in_features(self) -> int:
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        return self.spec.out_features


@dataclass(frozen=True)
class Candidate:
    """One way to run an op on one layout: ``supports`` gives None or the reason of a refusal, ``run(x, weight, bias,
    problem)`` the result.

    A kernel that can be configured has ``configurations(problem)``: named tuples that all run on the problem's device,
    the estimated best first; ``run`` then takes one as ``configuration``. One that ``gathers`` takes ``columns`` of x
    as it reads it. ``waits`` gives None or why a problem that it serves is left to others until it has been measured;
    ``sb.tune`` measures it, and a forced backend runs it.
    """

    op: str
    layout: str
    backend: str
    description: str
    supports: Callable[[Problem], str | None]
    run: Callable[..., Any]
    configurations: Callable[[Problem], Sequence[Any]] | None = None
    gathers: bool = False
    waits: Callable[[Problem], str | None] | None = None

    def waiting(self, problem: Problem) -> str | None:
        """None, or why ``problem``, which it serves, is not its own unmeasured."""
        return None if self.waits is None else self.waits(problem)


class Solution(NamedTuple):
    """What runs a problem. ``source`` of the configuration (None where there is nothing to configure): ``estimated``,
    or that of the measurement it is of."""

    candidate: Candidate
    configuration: Any = None
    source: str = ""

    @property
    def backend(self) -> str:
        return self.candidate.backend

    @property
    def description(self) -> str:
        if self.configuration is None:
            return self.candidate.description
        fields = ", ".join(f"{name} {value}" for name, value in self.configuration._asdict().items())
        return f"{self.candidate.description}; {fields}: {self.source}"

    @property
    def options(self) -> dict[str, Any]:
        """The keywords for ``candidate.run``."""
        return {} if self.configuration is None else {"configuration": self.configuration}

    def run(
        self,
        x: torch.Tensor,
        weight: list[torch.Tensor],
        bias: torch.Tensor | None,
        problem: Problem,
        columns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The result; ``columns``: those of x that the weight has."""
        if columns is None:
            return self.candidate.run(x, weight, bias, problem, **self.options)
        if self.candidate.gathers:
            return self.candidate.run(x, weight, bias, problem, columns=columns, **self.options)
        return self.candidate.run(x.index_select(-1, columns), weight, bias, problem, **self.options)


_candidates: dict[tuple[str, str], list[Candidate]] = {}


def add_candidate(candidate: Candidate) -> None:
    """Adds a candidate; those of a layout stay in the order of ``BACKENDS``, hand-written kernels first."""
    if candidate.backend not in BACKENDS:
        raise ValueError(f"{candidate.op}: backend is {candidate.backend!r}, expected one of {', '.join(BACKENDS)}")
    entries = _candidates.setdefault((candidate.op, candidate.layout), [])
    entries.append(candidate)
    entries.sort(key=lambda c: BACKENDS.index(c.backend))
    _choose.cache_clear()
    _fused.cache_clear()


def candidates(op: str, layout: str) -> tuple[Candidate, ...]:
    return tuple(_candidates.get((op, layout), ()))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend (``cuda``, ``triton``, ``torch``, ``reference``) for the ops called in this context.

    It wins over ``SPARSEBERT_BACKEND``. A call it cannot serve raises ``RuntimeError`` with the reason.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is unknown, expected one of {', '.join(BACKENDS)}")
    global _open_contexts
    token = _forced.set(name)
    _open_contexts += 1
    try:
        yield
    finally:
        _open_contexts -= 1
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend forced in this context, or by the environment, or None."""
    return _forced.get() or _environment


def may_be_forced() -> bool:
    """False where certainly no backend is forced; cheap, and plain enough for torch.compile to guard on."""
    return _open_contexts > 0 or _environment is not None


def problem_of(spec: Any, layout: str, x: torch.Tensor, activation: str) -> Problem:
    """The problem of one call with the rows ``x``."""
    tokens = x.numel() // max(1, x.shape[-1])
    return Problem(layout, describe(x.device), x.dtype, spec, tokens, activation)


def choose(problem: Problem, *, force: bool = True) -> Solution:
    """What runs ``problem``; ``RuntimeError`` with every refusal where nothing does. ``force``: whether a forced
    backend is, which one op on the way to another may not have."""
    return _choose(problem, problem.op, forced_backend() if force else None, measurements.generation())


def choose_between(problem: Problem) -> Solution:
    """As ``choose``, for an op between linear layers: a forced backend that has no kernel for it at all leaves it as it
    is, so that a whole model can be run by the linear layers of one backend."""
    forced = forced_backend()
    return choose(problem, force=any(c.backend == forced for c in candidates(problem.op, problem.layout)))


def fused(problem: Problem) -> Solution | None:
    """The one kernel for an op that two can run as well, where it serves ``problem`` and is forced, or was measured to
    be quicker than they are."""
    return _fused(problem, problem.op, forced_backend(), measurements.generation())


@lru_cache(maxsize=16384)
def _fused(problem: Problem, op: str, forced: str | None, generation: int) -> Solution | None:
    row = measurements.of(problem.spec, problem.layout, problem.dtype, problem.device, problem.tokens)
    wanted = forced or (None if row is None else row.backend)
    for candidate, reason in review(problem):
        if reason is None and candidate.backend == wanted:
            return solutions(candidate, problem, row)[0]
    return None


# ``op`` is there for the cache: specs of two ops are equal where their numbers are, as tuples.
@lru_cache(maxsize=16384)
def _choose(problem: Problem, op: str, forced: str | None, generation: int) -> Solution:
    row = measurements.of(problem.spec, problem.layout, problem.dtype, problem.device, problem.tokens)
    refusals = []
    served = []
    for candidate, reason in review(problem):
        if forced is not None and candidate.backend != forced:
            continue
        if reason is None:
            served.append(candidate)
        else:
            refusals.append(f"{candidate.backend}: {reason}")
    if served:
        measured = [candidate for candidate in served if row is not None and candidate.backend == row.backend]
        # Where all that serve wait, one is forced.
        found = measured or [candidate for candidate in served if candidate.waiting(problem) is None] or served
        return solutions(found[0], problem, row)[0]
    if forced is not None and not refusals:
        refusals = [f"{forced}: has no kernel for this layout"]
    raise RuntimeError(
        f"{op}: no {'forced ' if forced else ''}backend serves layout {problem.layout!r} on "
        f"{problem.device.type} ({'; '.join(refusals) or 'no candidates'})"
    )


def solutions(candidate: Candidate, problem: Problem, row: measurements.Row | None = None) -> list[Solution]:
    """``candidate`` in each configuration it may run ``problem`` in, that of the measurement ``row`` first, else its
    estimate."""
    if candidate.configurations is None:
        return [Solution(candidate)]
    found = [Solution(candidate, configuration, "estimated") for configuration in candidate.configurations(problem)]
    for i, solution in enumerate(found):
        if (
            row is not None
            and row.backend == candidate.backend
            and row.configuration == solution.configuration._asdict()
        ):
            return [solution._replace(source=row.source), *found[:i], *found[i + 1 :]]
    return found


def review(problem: Problem) -> list[tuple[Candidate, str | None]]:
    """Every candidate of the problem's layout with None or the reason it refuses, best first."""
    return [(c, c.supports(problem)) for c in candidates(problem.op, problem.layout)]


def reasons(problem: Problem) -> list[tuple[Candidate, str | None]]:
    """As ``review``, for a user to read: also why a candidate waits, where nothing was measured and none is forced."""
    row = measurements.of(problem.spec, problem.layout, problem.dtype, problem.device, problem.tokens)
    settled = row is not None or forced_backend() is not None
    return [(c, reason if reason or settled else c.waiting(problem)) for c, reason in review(problem)]
