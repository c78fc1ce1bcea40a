"""Recipes: how a method trains on a task, in small TOML files (``sparsebert/recipes``) or a user's own.

A file says at its top what holds for every task, ``[tasks.NAME]`` what is other for one of GLUE, and ``[[stages]]``
what is other for one of several trainings, each of which begins with the model that the one before ended in::

    method = "seven"
    target = "bitmap:0.5"
    epochs = 10
    options = { start = "10%", length = 1000 }

    [tasks.rte]
    epochs = 20

A stage's own settings go before the file's, a task's before a stage's, and those of ``[[tasks.NAME.stages]]`` before
all. ``options`` are the method's arguments; a number of steps may be written as a share of the training's, ``"10%"``,
and what a method wants to know of the training data (``input_moments`` of ADMM, ``rows`` of SVD, which makes it FWSVD)
as the number of training batches in which it is measured.
"""

from __future__ import annotations

import inspect
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebert.configs import parse_config

if TYPE_CHECKING:
    from torch import Tensor

    from sparsebert.methods import Method
    from sparsebert.plan import CompressionPlan, Selection

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
TASKS_FILE = "tasks.toml"
SCHEDULES = ("linear", "constant")
# (method, option) -> what is measured: given as a number of batches.
MEASURED = {("admm", "input_moments"): "input moments", ("svd", "rows"): "Fisher row weights"}


@dataclass(frozen=True)
class Task:
    """A task of GLUE: ``train_rows`` of its training set, the metric it is judged by, and its name on the hub."""

    train_rows: int
    metric: str
    hub: str
    hub_columns: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One training. ``steps`` goes before ``epochs``. ``warmup`` counts optimizer steps, or is a share of them as
    ``"10%"``; ``max_grad_norm`` 0 clips nothing; ``weight_decay`` leaves biases and norms out. ``group_by_length``:
    batches of rows of similar length, which need less padding. ``target`` and ``layers`` are formats as the command
    line writes them.

    ``teacher``: whether the method is given one. ``distillation`` is for methods that take none: the loss is then
    (1 - distillation) loss + distillation T² KL(teacher || student) of the logits, T ``temperature``.
    """

    method: str
    target: str | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    teacher: bool = False
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 3e-5
    schedule: str = "linear"
    warmup: int | str = "10%"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_length: int = 128
    distillation: float = 0.0
    temperature: float = 2.0
    group_by_length: bool = False

    def __post_init__(self) -> None:
        positive = {
            "epochs": self.epochs,
            "lr": self.lr,
            "steps": 1 if self.steps is None else self.steps,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "temperature": self.temperature,
        }
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, expected a positive number")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}, expected 0 or more")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation is {self.distillation}, expected 0 to 1")
        if self.distillation and self.teacher:
            raise ValueError(f"distillation is {self.distillation}, but {self.method} is given the teacher itself")
        if self.max_length < 3:
            raise ValueError(f"max_length is {self.max_length}, expected at least 3 (two special tokens and a word)")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        # Whether it fits the training is seen when its length is known.
        if isinstance(self.warmup, str):
            _share(self.warmup, 100, "warmup")
        elif self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}, expected 0 or more")
        for text in (self.target, *self.layers.values()):
            if text is not None and text != "dense":
                parse_config(text)

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the training on so many rows. An epoch takes all of them; its last batch may be short."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * steps_per_epoch(rows, self.batch_size, self.accumulate)))

    def warmup_steps(self, total: int) -> int:
        warm = _share(self.warmup, total, "warmup") if isinstance(self.warmup, str) else self.warmup
        if warm >= total and warm:
            raise ValueError(f"warmup takes {warm} steps, expected fewer than the {total} of the training")
        return warm

    def selection(self, roles: tuple[str, ...]) -> Selection:
        """What the method is to do to which layer: ``target`` for every role, ``layers`` before it."""
        every = None if self.target is None else parse_config(self.target)
        own = {which: None if text == "dense" else parse_config(text) for which, text in self.layers.items()}
        return {**({} if every is None else dict.fromkeys(roles, every)), **own}

    def build(
        self,
        total_steps: int,
        selection: Selection,
        plan: CompressionPlan | None = None,
        measure: Callable[[str, int], Mapping[str, Tensor]] | None = None,
    ) -> Method:
        """The method with its options; ``ValueError`` for a method or option that there is not. ``measure`` gives what
        an option in ``MEASURED`` asks for, by its name, of the selected layers in so many batches."""
        cls = method_class(self.method)
        first, names = arguments(cls)
        if stray := sorted(self.options.keys() - names):
            raise ValueError(f"{self.method}: has no option {stray[0]!r}; it has {', '.join(sorted(names)) or 'none'}")
        if first == "plan" and plan is None:
            raise ValueError(f"{self.method}: goes on from what another method ended in; make it the second stage")
        options = {
            name: _share(value, total_steps, name) if isinstance(value, str) and value.endswith("%") else value
            for name, value in self.options.items()
        }
        for name, count in options.items():
            if (what := MEASURED.get((self.method, name))) is None:
                continue
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{self.method}: {name} is {count!r}, expected in how many batches to measure them")
            if measure is None:
                raise ValueError(
                    f"{self.method}: {what} are measured on the training's batches, of which none are here"
                )
            options[name] = measure(name, count)
        make: Any = cls
        return make(plan if first == "plan" else selection, **options)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Recipe:
    name: str
    stages: tuple[Stage, ...]
    task: Task | None = None


_KEYS = {entry.name for entry in fields(Stage)}


def steps_per_epoch(rows: int, batch_size: int, accumulate: int) -> int:
    return math.ceil(math.ceil(rows / batch_size) / accumulate)


def method_class(name: str) -> type[Method]:
    from sparsebert.methods import METHODS

    if name not in METHODS:
        raise ValueError(f"method is {name!r}, expected one of {', '.join(sorted(METHODS))}")
    return METHODS[name]


def arguments(cls: type) -> tuple[str, set[str]]:
    """The first argument of a method, ``config`` or ``plan``, and the names of its options."""
    first, *others = inspect.signature(cls).parameters
    return first, set(others)


def tasks() -> dict[str, Task]:
    """The tasks of GLUE that recipes are for."""
    found = {}
    for name, entry in _toml(FOLDER / TASKS_FILE).items():
        found[name] = Task(**{**entry, "hub_columns": tuple(entry["hub_columns"])})
    return found


def names() -> list[str]:
    """Every recipe of the package as METHOD:TASK."""
    files = sorted(file for file in FOLDER.glob("*.toml") if file.name != TASKS_FILE)
    return [f"{file.stem}:{task}" for file in files for task in _toml(file).get("tasks", {})]


def load(name: str) -> Recipe:
    """The recipe of that name, NAME or NAME:TASK, NAME being one of the package's or a file that ends in .toml.

    ``ValueError`` naming the file where there is none, a key is unknown, or a value is none that it can have.
    """
    place, _, task = name.partition(":")
    if place.endswith(".toml"):
        file = Path(place).expanduser()
        if not file.is_file():
            raise ValueError(f"{place}: there is no such file")
    else:
        file = FOLDER / f"{place}.toml"
        known = sorted(found.stem for found in FOLDER.glob("*.toml") if found.name != TASKS_FILE)
        if place not in known:
            raise ValueError(f"recipe is {place!r}, expected one of {', '.join(known)}, or a file that ends in .toml")
    try:
        return _recipe(name, _toml(file), task)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def _recipe(name: str, content: dict[str, Any], task: str) -> Recipe:
    every = tasks()
    own = content.pop("tasks", {})
    stages = content.pop("stages", [{}])
    _table(own, "tasks")
    for key, entry in own.items():
        if key not in every:
            raise ValueError(f"tasks has {key!r}, expected one of {', '.join(every)}")
        _table(entry, f"tasks.{key}")
    if not isinstance(stages, list) or not stages:
        raise ValueError("stages is empty or no list, expected [[stages]]")
    if task and task not in own:
        raise ValueError(f"has no task {task!r}; its tasks: {', '.join(own) or 'none'}")
    made = {}
    # All of them: a mistake in one task is found whichever is asked for.
    for key in [*own, ""]:
        found = dict(own.get(key, {}))
        later = found.pop("stages", [{}] * len(stages))
        if not isinstance(later, list) or len(later) != len(stages):
            raise ValueError(f"tasks.{key}.stages: expected {len(stages)}, one for each of the file's")
        try:
            made[key] = tuple(_stage([content, stage, found, last]) for stage, last in zip(stages, later, strict=True))
        except (ValueError, TypeError) as error:
            raise ValueError(f"tasks.{key}: {error}" if key else str(error)) from None
    return Recipe(name, made[task], every.get(task))


def _stage(parts: list[dict[str, Any]]) -> Stage:
    """The later of ``parts`` go before the earlier; options and layers are taken together."""
    merged: dict[str, Any] = {}
    for part in parts:
        _table(part, "a stage")
        if stray := sorted(part.keys() - _KEYS):
            raise ValueError(f"has the key {stray[0]!r}, expected one of {', '.join(sorted(_KEYS))}, tasks, stages")
        if "method" in part:
            # The options above are another method's.
            merged.pop("options", None)
        for key, value in part.items():
            _check_type(key, value)
            together = key in ("options", "layers")
            merged[key] = {**merged.get(key, {}), **value} if together else value
    if "method" not in merged:
        raise ValueError("has no method")
    return Stage(**merged)


_TYPES: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "target": (str,),
    "layers": (dict,),
    "options": (dict,),
    "teacher": (bool,),
    "epochs": (int, float),
    "steps": (int,),
    "batch_size": (int,),
    "accumulate": (int,),
    "lr": (float, int),
    "schedule": (str,),
    "warmup": (int, str),
    "weight_decay": (int, float),
    "max_grad_norm": (int, float),
    "max_length": (int,),
    "distillation": (int, float),
    "temperature": (int, float),
    "group_by_length": (bool,),
}


def _check_type(key: str, value: Any) -> None:
    kinds: tuple[type, ...] = _TYPES[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{key} is {value!r}, expected {wanted}")
    if isinstance(value, dict) and key == "layers" and not all(isinstance(text, str) for text in value.values()):
        raise TypeError(f"layers is {value!r}, expected formats by role or pattern")


def _table(value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {type(value).__name__}, expected a table")


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {error}") from None


def _share(text: str, total: int, name: str) -> int:
    """``"10%"`` of ``total``, at least 1 unless it is 0 %."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if match is None or float(match[1]) > 100:
        raise ValueError(f"{name} is {text!r}, expected a number, or a share of the steps such as '10%'")
    share = float(match[1])
    return max(1, round(total * share / 100)) if share else 0


def parse_option(text: str) -> tuple[str, Any]:
    """``start=100`` or ``variant=pre``: numbers and booleans as in TOML, anything else is text."""
    name, sign, value = text.partition("=")
    if not (sign and name.strip().isidentifier()):
        raise ValueError(f"{text!r} does not say which option; write it as start=100 or start=10%")
    value = value.strip()
    if re.fullmatch(r"[+-]?\.\d+", value):
        # No number in TOML.
        return name.strip(), float(value)
    try:
        found = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        found = value
    return name.strip(), found
