"""The loop of ``sparsebert train``: one method's run on one model, and its state on disk, from which it goes on.

A plain loop instead of transformers' Trainer: a state is then one file of tensors and one of JSON with no pickle
between them, Ctrl-C ends between two steps, and what the Trainer would bring besides (accumulation, clipping, autocast,
a linear schedule) is a line each.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsebert import methods, storage
from sparsebert.bench.retrieval import length_batches
from sparsebert.cli.inputs import pad
from sparsebert.cli.recipes import Stage, steps_per_epoch
from sparsebert.methods import Run
from sparsebert.plan import Selection

STATE_VERSION = 1
STATE_FILE, TENSORS_FILE = "state.json", "state.safetensors"
# Counting the zeros of every layer takes a while: once in so many seconds is often enough to look at.
SHOWN_EVERY_S = 1.0


@dataclass(frozen=True)
class Examples:
    """Tokenized rows: the model's inputs by name, lists of ids, and a label for each row."""

    tokenizer: Any
    inputs: dict[str, list[list[int]]]
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.inputs["input_ids"]]

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The model's inputs of these rows, padded to the longest of them, with ``labels``."""
        picked = {key: [values[i] for i in indices] for key, values in self.inputs.items()}
        tensors = pad(self.tokenizer, picked)
        tensors["labels"] = torch.tensor([self.labels[i] for i in indices])
        return {key: tensor.to(device) for key, tensor in tensors.items()}


@dataclass
class Progressed:
    """How far a training is, beside what the tensors hold: ``stage`` and ``step`` in it, seconds spent on its steps,
    the loss of the last step, and every evaluation on the way as (step, scores)."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    loss: Any = None
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what to say about it."""


def rate(step: int, total: int, warm: int, schedule: str) -> float:
    """The factor of the learning rate in step 0 .. total - 1: up to 1 in ``warm`` steps, the first one not being lost
    to a rate of 0, then constant, or linearly down to 0 after the last."""
    up = (step + 1) / warm if step < warm else 1.0
    return up if schedule == "constant" else min(up, (total - step) / max(1, total - warm))


def epoch_order(rows: int, seed: int, stage: int, epoch: int) -> list[int]:
    """The rows of an epoch in their order, the same whenever it is asked for."""
    # Far apart, so that no two of (seed, stage, epoch) meet in a training anyone does.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + stage * 100_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator).tolist()


def by_length(order: Sequence[int], lengths: Sequence[int], size: int, seed: int) -> list[int]:
    """``order`` in other batches of ``size``: of every 50 batches' rows those of similar length together, the batches
    in an order that ``seed`` draws. A last batch that is not full stays the last."""
    chunk = 50 * size
    sorted_rows: list[int] = []
    for start in range(0, len(order), chunk):
        sorted_rows += sorted(order[start : start + chunk], key=lambda row: lengths[row])
    whole = len(sorted_rows) // size
    batches = torch.randperm(whole, generator=torch.Generator().manual_seed(seed)).tolist()
    found = [row for batch in batches for row in sorted_rows[batch * size : (batch + 1) * size]]
    return found + sorted_rows[whole * size :]


def make_optimizer(model: nn.Module, stage: Stage) -> torch.optim.AdamW:
    """AdamW on all that requires grad; decay for matrices alone, not for biases and norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One pass over each tensor. Of a step of MiniLM on a CPU the other form takes a fifth, this one a twentieth.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=stage.lr, fused=True)


class Loop:
    """One stage: ``run`` at work on ``model``. ``step()`` does the next optimizer step; ``save`` and ``load`` are
    what goes on disk between two of them. ``teacher``: whom the stage's own distillation asks; ``ValueError`` where it
    has a weight and no teacher, or the method replaces the task's loss."""

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        stage: Stage,
        examples: Examples,
        *,
        seed: int,
        index: int,
        device: torch.device,
        bf16: bool = False,
        teacher: nn.Module | None = None,
    ) -> None:
        if stage.distillation:
            if teacher is None:
                raise ValueError(f"{stage.method}: distillation is {stage.distillation}, but there is no teacher")
            if run.replaces_task_loss:
                raise ValueError(f"{stage.method}: replaces the task's loss, so nothing can be distilled beside it")
        self.teacher = methods.Teacher(teacher) if teacher is not None and stage.distillation else None
        self.model, self.run, self.stage, self.examples = model, run, stage, examples
        self.seed, self.index, self.device, self.bf16 = seed, index, device, bf16
        self.total = run.total_steps
        self.warm = stage.warmup_steps(self.total)
        self.per_epoch = steps_per_epoch(len(examples), stage.batch_size, stage.accumulate)
        self.at = Progressed(stage=index)
        self.optimizer = make_optimizer(model, stage)
        self._lengths = examples.lengths() if stage.group_by_length else None
        self._epoch: tuple[int, list[int]] | None = None
        # True while weights, moments and masks are of two different steps.
        self.torn = False
        # Torch's generators as they were when the step at hand began.
        self._random: dict[str, Tensor] | None = None

    def start(self) -> None:
        """Call this, or ``load``, before the first step."""
        self.run.attach(self.optimizer)

    @property
    def epoch(self) -> float:
        return self.at.step / self.per_epoch

    def evaluated(self) -> bool:
        """Whether the weights of now have been."""
        return bool(self.at.evaluations) and self.at.evaluations[-1][0] == self.at.step

    def micro_batches(self, step: int) -> list[list[int]]:
        """The rows of an optimizer step, in ``accumulate`` batches; the last step of an epoch may have fewer."""
        epoch, place = divmod(step, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            order = epoch_order(len(self.examples), self.seed, self.index, epoch)
            if self._lengths is not None:
                order = by_length(order, self._lengths, self.stage.batch_size, self.seed + epoch)
            self._epoch = epoch, order
        size = self.stage.batch_size
        rows = self._epoch[1][place * size * self.stage.accumulate : (place + 1) * size * self.stage.accumulate]
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def step(self) -> None:
        """One optimizer step on ``micro_batches``, each weighing as many rows as it has."""
        started = time.perf_counter()
        self._random = self._generators()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.lr * rate(self.at.step, self.total, self.warm, self.stage.schedule)
        self.optimizer.zero_grad()
        batches = self.micro_batches(self.at.step)
        rows = sum(map(len, batches))
        total = torch.zeros((), device=self.device)
        for indices in batches:
            inputs = self.examples.batch(indices, self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                outputs = self.model(**inputs)
                loss = self._loss(outputs, inputs) * (len(indices) / rows)
            loss.backward()
            total += loss.detach()
        if self.stage.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.stage.max_grad_norm)
        self.torn = True
        self.optimizer.step()
        self.at.step += 1
        self.at.loss = total
        self._random = None
        self.torn = False
        self.at.seconds += time.perf_counter() - started

    def _loss(self, outputs: Any, inputs: dict[str, Tensor]) -> Tensor:
        loss = self.run.total_loss(outputs, inputs)
        if self.teacher is None:
            return loss
        _, answer = self.teacher.ask(inputs)
        share = self.stage.distillation
        return (1 - share) * loss + share * methods.kl_divergence(outputs.logits, answer.logits, self.stage.temperature)

    def check_loss(self) -> float | None:
        """The last loss as a number; ``ValueError`` where training has diverged."""
        if isinstance(self.at.loss, Tensor):
            self.at.loss = float(self.at.loss)
        if self.at.loss is not None and not math.isfinite(self.at.loss):
            raise ValueError(f"the loss is {self.at.loss} at step {self.at.step}; a smaller --lr may help")
        return self.at.loss

    # State

    def save(self, folder: Path, more: dict[str, Any]) -> None:
        """Writes all that the next step depends on, and ``more``, into the new ``folder``, which appears when it is
        complete."""
        tensors: dict[str, Tensor] = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        values: dict[str, dict[str, Any]] = {"optimizer": {}, "run": {}}
        for i, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                _file(f"{i}.{name}", value, "optimizer", tensors, values)
        for name, value in self.run.state_dict().items():
            _file(name, value, "run", tensors, values)
        random = self._generators() if self._random is None else self._random
        tensors.update({f"random.{name}": state for name, state in random.items()})
        self.check_loss()
        content = {
            "state_version": STATE_VERSION,
            "progress": {**self.at.__dict__, "evaluations": [list(entry) for entry in self.at.evaluations]},
            "values": values,
            **more,
        }
        building = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        # Copies: safetensors refuses tensors that share memory.
        save_file({key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}, _at(building)[1])
        _at(building)[0].write_text(json.dumps(content), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)

    def load(self, folder: Path) -> None:
        """Takes up what ``save`` wrote, in place of ``start``; ``ValueError`` where it is of another model or
        method."""
        content = read_state(folder)
        file = _at(folder)[1]
        # Refuses what is no safetensors file by its name.
        storage.read_headers([file])
        parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "run": {}, "random": {}}
        for key, tensor in load_file(file).items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise ValueError(f"{file}: holds {storage.short(repr(key))}, which is no part of a training's state")
            parts[part][name] = tensor
        for part, found in content["values"].items():
            parts[part].update(found)
        try:
            self.model.load_state_dict(parts["model"])
            self.run.load_state_dict(parts["run"])
            self.start()
            moments: dict[int, dict[str, Any]] = {}
            for name, value in parts["optimizer"].items():
                index, _, kind = name.partition(".")
                moments.setdefault(int(index), {})[kind] = value
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{folder}: does not fit this model and method: {error}") from None
        progress = content["progress"]
        evaluations = [(step, scores) for step, scores in progress.pop("evaluations")]
        self.at = Progressed(**progress, evaluations=evaluations)
        torch.set_rng_state(parts["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in parts["random"]:
            torch.cuda.set_rng_state(parts["random"]["cuda"], self.device)

    def _generators(self) -> dict[str, Tensor]:
        found = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(self.device)
        return found


def _file(name: str, value: Any, part: str, tensors: dict[str, Tensor], values: dict[str, dict[str, Any]]) -> None:
    if isinstance(value, Tensor):
        tensors[f"{part}.{name}"] = value
    elif value is None or isinstance(value, bool | int | float | str):
        values[part][name] = value
    else:
        raise TypeError(f"training state: {part} {name} is {type(value).__name__}, expected a tensor or a number")


def _at(folder: Path) -> tuple[Path, Path]:
    return folder / STATE_FILE, folder / TENSORS_FILE


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a state that ``Loop.save`` wrote; ``ValueError`` naming the file where it is none."""
    file = _at(folder)[0]
    content = storage.read_json(file)
    if content.get("state_version") != STATE_VERSION or not {"progress", "values"} <= content.keys():
        raise ValueError(f"{file}: is no training state of version {STATE_VERSION}")
    return content


class Shelf:
    """The states of one training, a folder each, of which the newest is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, stage: int, step: int) -> Path:
        return self.folder / f"stage-{stage}-step-{step:08d}"

    def newest(self) -> Path | None:
        found = [p for p in self.folder.glob("stage-*") if re.fullmatch(r"stage-\d+-step-\d+", p.name)]
        return max(found, key=lambda p: tuple(int(n) for n in re.findall(r"\d+", p.name)), default=None)

    def keep(self, loop: Loop, more: dict[str, Any]) -> Path:
        """Saves ``loop`` and removes the states before it."""
        place = self.place(loop.index, loop.at.step)
        loop.save(place, more)
        for other in self.folder.glob("stage-*-step-*"):
            if other != place:
                shutil.rmtree(other, ignore_errors=True)
        return place


def measure_on(
    model: nn.Module,
    examples: Examples,
    selection: Selection,
    batch_size: int,
    seed_and_stage: tuple[int, int],
    device: torch.device,
    name: str,
    count: int,
) -> dict[str, Tensor]:
    """What the option ``name`` of a method asks for (``recipes.MEASURED``), in the first ``count`` batches of the
    stage's training set, in evaluation mode."""
    order = epoch_order(len(examples), *seed_and_stage, 0)
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)][:count]
    measure = methods.input_moments if name == "input_moments" else methods.fisher_row_weights
    was_training = model.training
    model.eval()
    try:
        return measure(model, (examples.batch(rows, device) for rows in batches), selection)
    finally:
        model.train(was_training)


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted, and the function given says whether there was one; the second one
    interrupts at once. Outside of the main thread, where no signal arrives, nothing is noted."""
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def predict(
    model: Any,
    examples: Examples,
    device: torch.device,
    batch_size: int,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """The model's outputs (rows, classes) for every row, on the CPU; the model is in the mode it was in afterwards."""
    found: list[Tensor | None] = [None] * len(examples)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            done = 0
            for indices in length_batches(examples.lengths(), batch_size):
                inputs = examples.batch(indices, device)
                del inputs["labels"]
                logits = model(**inputs).logits.float().cpu()
                if not torch.isfinite(logits).all():
                    raise ValueError("the model's output holds NaN or infinities, expected finite numbers")
                for i, row in zip(indices, logits, strict=True):
                    found[i] = row
                done += len(indices)
                tick(done, len(examples))
    finally:
        model.train(was_training)
    return torch.stack([row for row in found if row is not None])
