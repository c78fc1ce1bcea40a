"""What is kept at which optimizer step. Steps are counted from 1: ``step`` of them are done, the last one is
``total_steps``. A schedule that does not fit its training is a ``ValueError`` when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cubic:
    """The fraction of weights that is kept, from 1 down to ``final`` along a cubic curve.

    With t the step, T ``total_steps``, a ``start`` and b ``end`` steps before and after the descent::

        r(t) = 1                                                      t <= a
        r(t) = final + (1 - final) (1 - (t - a) / (T - a - b))^3      a < t <= T - b
        r(t) = final                                                  t > T - b

    ``due``: masks are renewed every ``every`` steps of the descent, and at each of the last ``end`` steps. Zhu and
    Gupta: To prune, or not to prune (2017), as used by movement pruning, PLATON and LoSparse.

    Layers with targets of their own share one schedule through ``left``, the part of the descent that is still to come,
    from 1 to 0: a layer whose target is f keeps f + (1 - f) left.
    """

    final: float
    total_steps: int
    start: int = 0
    end: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        _check_final(self.final)
        _check_steps(start=self.start, end=self.end, total_steps=self.total_steps)
        _check_steps(1, every=self.every)
        if self.start + self.end >= self.total_steps:
            raise ValueError(
                f"schedule: start and end take {self.start} + {self.end} steps, expected fewer than the "
                f"{self.total_steps} of the training"
            )

    def left(self, step: int) -> float:
        """The part of the descent that is still to come: 1 up to ``start``, 0 from ``total_steps`` - ``end`` on."""
        descent = self.total_steps - self.start - self.end
        return (1 - min(max(step - self.start, 0), descent) / descent) ** 3

    def remaining(self, step: int) -> float:
        return _kept(self.final, self.left(step))

    def due(self, step: int) -> bool:
        """Whether masks are renewed after this step."""
        if step <= self.start:
            return False
        # Without steps at the end the last one has to be there whatever ``every`` is.
        return step > self.total_steps - self.end or step == self.total_steps or step % self.every == 0

    def falls(self, step: int) -> bool:
        """Whether masks are renewed after this step, and not all at their target before it: what is due where nothing
        grows back."""
        return self.due(step) and step <= self.total_steps - self.end + 1


@dataclass(frozen=True)
class Window:
    """A cubic descent inside the ``length`` steps from ``start`` on, as SEVEN's code counts them.

    After step t, with j = t - 1 - start::

        r = final + (1 - final) (1 - (j + 1) / length)^3              0 <= j <= length - 2

    The last of them leaves a hair more than ``final``, and the code stops there; here the step after it, the last of
    the window, is at ``final``. ``every``: masks are renewed every so many steps, and at the last.
    """

    final: float
    total_steps: int
    start: int
    length: int
    every: int = 1

    def __post_init__(self) -> None:
        _check_final(self.final)
        _check_steps(start=self.start, total_steps=self.total_steps)
        _check_steps(1, length=self.length, every=self.every)
        if self.start + self.length > self.total_steps:
            raise ValueError(
                f"schedule: the window ends after {self.start} + {self.length} steps, but the training has "
                f"{self.total_steps}: the target would not be reached"
            )

    def inside(self, step: int) -> bool:
        return self.start < step <= self.start + self.length

    def left(self, step: int) -> float:
        """The part of the descent that is still to come: 1 up to ``start``, 0 from the window's last step on."""
        return (1 - min(max(step - self.start, 0), self.length) / self.length) ** 3

    def remaining(self, step: int) -> float:
        return _kept(self.final, self.left(step))

    def due(self, step: int) -> bool:
        """Whether masks are renewed after this step."""
        return self.inside(step) and ((step - self.start) % self.every == 0 or step == self.start + self.length)


@dataclass(frozen=True)
class Updates:
    """A cubic descent in about ``updates`` equal parts of the training, as SparseBERT's code counts them.

    With t the step, T = ``total_steps`` - ``end``, f = max(1, round(T / updates)) (half to even), C = T // f and
    c = min(t // f, C)::

        r(t) = 1 - (1 - final) (1 - (1 - c / C)^3)

    Masks are renewed when t is a multiple of f, up to C f. That makes C updates, which is ``updates`` only about: 124
    for T = 249, 102 for T = 1234, and T itself for fewer steps than half of ``updates``, where the published code
    divides by zero. It also leaves out an update that falls on the last step; here the last one always comes, so that
    ``final`` is reached. ``end``: steps after the descent, at ``final``; the published schedule has none.
    """

    final: float
    total_steps: int
    updates: int = 100
    end: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.final <= 1:
            raise ValueError(f"schedule: final fraction is {self.final}, expected above 0 and at most 1")
        if self.updates < 1 or self.end < 0:
            raise ValueError(
                f"schedule: updates is {self.updates} and end {self.end} steps, expected at least 1 and at least 0"
            )
        if self.end >= self.total_steps:
            raise ValueError(
                f"schedule: the end takes {self.end} steps, expected fewer than the {self.total_steps} of the training"
            )

    @property
    def every(self) -> int:
        """f, the steps from one update to the next."""
        return max(1, round((self.total_steps - self.end) / self.updates))

    @property
    def count(self) -> int:
        """C, how many updates there are."""
        return (self.total_steps - self.end) // self.every

    @property
    def last(self) -> int:
        """The step of the last update: from there on ``final`` is kept."""
        return self.count * self.every

    def remaining(self, step: int) -> float:
        if step >= self.last:
            return self.final
        return 1 - (1 - self.final) * (1 - (1 - step // self.every / self.count) ** 3)

    def due(self, step: int) -> bool:
        """Whether masks are renewed after this step."""
        return 0 < step <= self.last and step % self.every == 0


@dataclass(frozen=True)
class Linear:
    """A number that falls from ``first`` to 0 in ``steps`` steps and stays there: p(t) = first max(0, 1 - t / steps)"""

    first: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= 1 or self.steps < 1:
            raise ValueError(
                f"schedule: first is {self.first} and steps {self.steps}, expected 0 to 1 and at least 1 step"
            )

    def at(self, step: int) -> float:
        return self.first * max(0.0, 1 - step / self.steps)


def kept_in_group(remaining: float, n: int, m: int) -> int:
    """How many of ``m`` are kept on the way to n:m while the schedule keeps ``remaining``: never fewer than ``n``."""
    # A fraction that comes out a rounding error above a whole number means that number.
    return min(m, max(n, math.ceil(remaining * m - 1e-9)))


def _kept(final: float, left: float) -> float:
    # final + (1 - final) need not be 1 in floating point.
    return 1.0 if left == 1 else final + (1 - final) * left


def _check_final(final: float) -> None:
    if not 0 < final <= 1:
        raise ValueError(f"schedule: final fraction is {final}, expected above 0 and at most 1")


def _check_steps(least: int = 0, /, **steps: int) -> None:
    for name, value in steps.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"schedule: {name} is {value!r}, expected a whole number of steps, {least} or more")
