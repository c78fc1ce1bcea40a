"""A method's run inside the transformers ``Trainer``: attached to its optimizer, saved and resumed with it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments

from sparsebert.methods import Run

logger = logging.getLogger(__name__)

_NAME = "compression_state"
_FORMAT_VERSION = 1
# What the names of logged metrics begin with.
METRICS = "compression/"
# How a tensor is written inside the JSON part.
_TENSOR = "$tensor"
_MAX_JSON_BYTES = 64 << 20


class CompressionCallback(TrainerCallback):
    """Puts ``run``, which ``method.prepare(...)`` gives, into a ``Trainer(..., callbacks=[CompressionCallback(run)])``.

    The run is attached to the Trainer's optimizer once that exists, so it sees the clipped, accumulated gradients of
    each optimizer step. Every Trainer checkpoint also gets the run's state (``compression_state.safetensors`` and
    ``.json``), which is restored when training resumes. ``resume_from`` names the checkpoint folder where it lies
    outside of the Trainer's output folder; the Trainer does not tell its callbacks. ``ValueError`` where a resumed
    training finds no state of its own, since it would go on with other masks.

    Every log gets ``run.metrics()``, as ``compression/sparsity`` and so on, while the run is at work. The loggers that
    ``report_to`` names come before this callback; with ``CompressionTrainer`` they get it too.

    A loss that the method adds (``run.loss``) is not added here, since a callback cannot reach the loss: for a method
    that trains by one, take ``CompressionTrainer``. With a plain Trainer its first step is a ``RuntimeError``.
    """

    def __init__(self, run: Run, *, resume_from: str | os.PathLike[str] | None = None) -> None:
        self.run = run
        self.resume_from = resume_from

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step:
            self.run.load_state_dict(load_run_state(self._resumed_folder(args, state)))
        if optimizer is None:
            raise ValueError("CompressionCallback: the Trainer has no optimizer when training begins")
        if state.max_steps != self.run.total_steps:
            logger.warning(
                "the Trainer makes %d optimizer steps, but the run was prepared for %d",
                state.max_steps,
                self.run.total_steps,
            )
        # A second train() comes with another wrapper or another optimizer.
        self.run.detach()
        self.run.attach(optimizer)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or any(name.startswith(METRICS) for name in logs):
            return
        found = self.metrics()
        logs.update(found)
        if state.log_history:
            # The Trainer has copied the log there already.
            state.log_history[-1].update(found)

    def metrics(self) -> dict[str, float]:
        """The run's metrics as they are logged; none before and after it is at work."""
        if not self.run.attached:
            return {}
        return {f"{METRICS}{name}": value for name, value in self.run.metrics().items()}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not folder.is_dir():
            logger.warning("%s is not there; this checkpoint cannot resume the compression", folder)
            return
        save_run_state(self.run.state_dict(), folder)

    def _resumed_folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        candidates = [self.resume_from, args.resume_from_checkpoint, Path(str(args.output_dir)) / name]
        for folder in (Path(c) for c in candidates if isinstance(c, str | os.PathLike)):
            if (folder / f"{_NAME}.json").is_file() and _same_training(folder, state):
                return folder
        raise ValueError(
            f"CompressionCallback: training resumes at step {state.global_step}, but no {_NAME}.json of it was found "
            f"in {', '.join(str(c) for c in candidates if c)}; pass resume_from="
        )


def save_run_state(state: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Writes a run's state, a nest of dicts and lists of tensors and JSON values, into ``folder`` without pickle."""
    tensors: dict[str, Tensor] = {}
    tree = _split(state, "", tensors)
    save_file(tensors, Path(folder, f"{_NAME}.safetensors"))
    Path(folder, f"{_NAME}.json").write_text(json.dumps({"format_version": _FORMAT_VERSION, "state": tree}))


def load_run_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``save_run_state`` wrote, tensors on the CPU; ``ValueError`` naming the file where it is not that."""
    file = Path(folder, f"{_NAME}.json")
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, expected at most {_MAX_JSON_BYTES}")
    try:
        data = json.loads(file.read_bytes())
        tensors = load_file(Path(folder, f"{_NAME}.safetensors"))
    except (ValueError, RecursionError, OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: the compression state cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format_version") != _FORMAT_VERSION or "state" not in data:
        raise ValueError(f"{file}: not a compression state of format_version {_FORMAT_VERSION}")
    return _join(data["state"], tensors, file)


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key == _TENSOR:
                raise TypeError(f"compression state: {name or 'state'} has the key {key!r}, expected a string")
        return {key: _split(part, f"{name}/{key}" if name else key, tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_split(part, f"{name}/{i}", tensors) for i, part in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"compression state: {name} is {type(value).__name__}, expected a tensor or a JSON value")


def _join(value: Any, tensors: dict[str, Tensor], file: Path) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            name = value[_TENSOR]
            if not isinstance(name, str) or name not in tensors:
                raise ValueError(f"{file}: tensor {name!r} is not in {_NAME}.safetensors")
            return tensors[name]
        return {key: _join(part, tensors, file) for key, part in value.items()}
    if isinstance(value, list):
        return [_join(part, tensors, file) for part in value]
    return value


def _same_training(folder: Path, state: TrainerState) -> bool:
    """Whether ``folder`` is the checkpoint that ``state`` was read from: equal step and history of losses."""
    try:
        saved = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    except (OSError, ValueError, TypeError):
        return False
    return saved.global_step == state.global_step and saved.log_history == state.log_history
