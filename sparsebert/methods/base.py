"""The contract of every method: ``Method(config).prepare(model, total_steps=...)`` gives a ``Run``.

A run never puts anything into the model that would be saved with it: masks live in the run. The loop is the user's::

    run = sb.methods.Magnitude(sb.NMConfig(2, 4)).prepare(model, total_steps=steps)
    run.attach(optimizer)
    for inputs in batches:
        outputs = model(**inputs)
        (outputs.loss + run.loss(outputs, inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    sb.compress_(model, run.finalize())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.configs import Config
from sparsebert.plan import CompressionPlan, Selection, select


class Method(ABC):
    """What to do, without a model: ``config`` is a config or a mapping from role or pattern, as ``compress_`` takes."""

    def __init__(self, config: Selection) -> None:
        self.config = config

    @abstractmethod
    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        """Starts the method on ``model``. ``total_steps`` counts optimizer steps; what a method does at which step is
        fixed here, and a schedule that does not fit is a ``ValueError``."""


class Run(ABC):
    """A method at work on one model: hooks around ``optimizer.step``, a loss term, a state to resume from."""

    def __init__(self, model: nn.Module, selection: Selection, total_steps: int) -> None:
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"{type(self).__name__}: total_steps is {total_steps!r}, expected a positive int")
        self.model = model
        self.total_steps = total_steps
        self.step = 0
        chosen, self.skipped = select(model, selection)
        self.configs: dict[str, Config] = chosen
        self._handles: list[Any] = []

    def weight(self, path: str) -> nn.Parameter:
        """The weight ``(out_features, in_features)`` of the layer at ``path``."""
        return self.model.get_submodule(path).weight  # type: ignore[return-value]

    def attach(self, optimizer: torch.optim.Optimizer) -> Run:
        """Installs the hooks on ``optimizer``: before a step on the accumulated, clipped gradients, after it on the new
        weights. A step that a loss scaler skips counts for nothing. ``ValueError`` where a run is attached already, or
        the optimizer does not hold a weight that the run prunes and that requires grad."""
        if self._handles:
            raise ValueError(f"{type(self).__name__}: already attached to an optimizer")
        # Wrappers such as Accelerate's pass step on to the optimizer they hold, whose hooks are the ones that run.
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for path in self.configs:
            weight = self.weight(path)
            if weight.requires_grad and id(weight) not in held:
                raise ValueError(
                    f"{type(self).__name__}: {path}: weight requires grad but is not in the optimizer; "
                    f"prepare the run on the model that the optimizer trains"
                )
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before()),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]
        return self

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def loss(self, outputs: Any, inputs: Any) -> Tensor:
        """What the method adds to the task's loss: a scalar tensor, zero for methods that add nothing."""
        device = next(self.model.parameters()).device
        return torch.zeros((), device=device)

    def before_step(self) -> None:  # noqa: B027 (a hook that few methods need)
        """Hook: gradients are accumulated and clipped, weights are old."""

    def after_step(self) -> None:  # noqa: B027 (a hook that few methods need)
        """Hook: weights are new, gradients still there; ``self.step`` counts this step."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor | int]:
        """All that is needed to resume with identical masks: tensors and ints by name."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state of a run with the same method and layers; ``ValueError`` where it does not fit."""

    @abstractmethod
    def finalize(self) -> CompressionPlan:
        """Makes the zeros exact, removes the hooks, and returns the plan, verified."""

    @torch.no_grad()
    def _before(self) -> None:
        self.before_step()

    @torch.no_grad()
    def _after(self) -> None:
        self.step += 1
        self.after_step()
