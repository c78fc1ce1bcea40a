"""The contract of every method: ``Method(config).prepare(model, total_steps=...)`` gives a ``Run``.

A run never puts anything into the model that is there when it ends: masks, duals and scores live in the run. The loop
is the user's::

    run = sb.methods.Magnitude(sb.NMConfig(2, 4)).prepare(model, total_steps=steps)
    optimizer = torch.optim.AdamW(model.parameters())
    run.attach(optimizer)
    for inputs in batches:
        outputs = model(**inputs)
        run.total_loss(outputs, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    sb.compress_(model, run.finalize())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sparsebert.configs import Config
from sparsebert.formats.common import wide
from sparsebert.plan import CompressionPlan, Selection, select


class Method(ABC):
    """What to do, without a model: ``config`` is a config or a mapping from role or pattern, as ``compress_`` takes."""

    def __init__(self, config: Selection) -> None:
        self.config = config

    @abstractmethod
    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        """Starts the method on ``model``. ``total_steps`` counts optimizer steps; what a method does at which step is
        fixed here, and a schedule that does not fit is a ``ValueError``.

        Make the optimizer afterwards: some methods give the model other parameters until they are finalized.
        """

    def _refuse_teacher(self, teacher: nn.Module | None) -> None:
        if teacher is not None:
            raise ValueError(f"{type(self).__name__}: takes no teacher; add a distillation loss in the training loop")


class Kind(NamedTuple):
    """One kind of tensor that a run keeps for each layer: its dtype (None: that of the weight) and whether it is a
    single number, or of the weight's shape. ``wide``: the weight's dtype, but 32 bits where that has 16."""

    dtype: torch.dtype | None = None
    scalar: bool = False
    wide: bool = False

    def dtype_for(self, weight: Tensor) -> torch.dtype:
        return wide(weight.dtype) if self.wide else self.dtype or weight.dtype


class Run(ABC):
    """A method at work on one model: hooks around ``optimizer.step``, a loss term, a state to resume from.

    A subclass names the tensors it keeps in ``kinds`` and keeps them in ``state``, kind -> path -> tensor: that is what
    is saved and resumed. Whether a step is the first of a phase must follow from ``step`` and ``state`` alone.
    """

    kinds: ClassVar[Mapping[str, Kind]] = {}
    # Whether training without ``loss`` would be another method: a step without it is then an error.
    needs_loss: bool = False
    # Whether ``loss`` stands in place of the task's loss, instead of beside it.
    replaces_task_loss: bool = False

    def __init__(self, model: nn.Module, selection: Selection, total_steps: int) -> None:
        if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
            raise ValueError(f"{self.method}: total_steps is {total_steps!r}, expected a positive int")
        self.model = model
        self.total_steps = total_steps
        self.step = 0
        chosen, self.skipped = select(model, selection)
        self.configs: dict[str, Config] = chosen
        self.state: dict[str, dict[str, Tensor]] = {}
        self._handles: list[Any] = []
        self._loss_added = False
        self._skips = False

    @property
    def method(self) -> str:
        """The method's name, for messages."""
        return type(self).__name__.removesuffix("Run")

    def weight(self, path: str) -> Tensor:
        """The weight ``(out_features, in_features)`` of the layer at ``path``, as the model computes with it."""
        return self.model.get_submodule(path).weight  # type: ignore[return-value]

    def trained(self, path: str) -> list[nn.Parameter]:
        """What the optimizer is to train in place of this layer's weight: the weight itself, in most methods."""
        return [self.weight(path)]  # type: ignore[list-item]

    def attach(self, optimizer: torch.optim.Optimizer) -> Run:
        """Installs the hooks on ``optimizer``: before a step on the accumulated, clipped gradients, after it on the new
        weights. A step that a loss scaler skips counts for nothing. ``ValueError`` where a run is attached already, or
        the optimizer does not hold a weight that the run prunes and that requires grad."""
        if self._handles:
            raise ValueError(f"{self.method}: already attached to an optimizer")
        # Wrappers such as Accelerate's pass step on to the optimizer they hold, whose hooks are the ones that run.
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for path in self.configs:
            if any(weight.requires_grad and id(weight) not in held for weight in self.trained(path)):
                raise ValueError(
                    f"{self.method}: {path}: weight requires grad but is not in the optimizer; "
                    f"prepare the run on the model that the optimizer trains, and before the optimizer is made"
                )
        self._follow()
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before(optimizer)),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]
        return self

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def attached(self) -> bool:
        """Whether the run is at work in an optimizer."""
        return bool(self._handles)

    def total_loss(self, outputs: Any, inputs: Any) -> Tensor:
        """What to backpropagate: ``outputs.loss``, the task's, plus ``loss``, or ``loss`` alone where the method
        replaces the task's.

        ``outputs`` are the model's for ``inputs``, the mapping it was called with. Under autocast call it inside, as
        the model. ``ValueError`` where the outputs have no loss: add ``loss`` to yours then.
        """
        added = self.loss(outputs, inputs)
        if self.replaces_task_loss:
            return added
        if (task := getattr(outputs, "loss", None)) is None:
            raise ValueError(f"{self.method}: the outputs have no loss; call the model with labels, or add run.loss")
        return task + added

    def loss(self, outputs: Any, inputs: Any) -> Tensor:
        """The method's part of ``total_loss``: a scalar tensor, zero for methods that add nothing.

        Methods whose ``needs_loss`` is true refuse an optimizer step for which this was not called. One that replaces
        the task's loss refuses that gradients come through ``outputs.loss``.
        """
        self._loss_added = True
        task = getattr(outputs, "loss", None)
        if self.replaces_task_loss and isinstance(task, Tensor) and task.requires_grad:
            task.register_hook(self._refuse_task_loss)
        return self.added_loss(outputs, inputs)

    def added_loss(self, outputs: Any, inputs: Any) -> Tensor:
        """``loss`` of a method that adds something."""
        return torch.zeros((), device=next(self.model.parameters()).device)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 (a hook that few methods need)
        """Hook: gradients are accumulated and clipped, weights are old. Without gradient tracking."""

    def after_step(self) -> None:  # noqa: B027 (a hook that few methods need)
        """Hook: weights are new, gradients still there; ``self.step`` counts this step. Without gradient tracking."""

    def metrics(self) -> dict[str, float]:
        """Numbers worth showing while it trains: ``sparsity``, the fraction of zeros in the layers' weights as the
        model computes with them, and what a method adds."""
        zeros = total = 0
        with torch.no_grad():
            for path in self.configs:
                weight = self.weight(path)
                zeros += weight.numel() - int(weight.count_nonzero())
                total += weight.numel()
        return {"sparsity": zeros / total}

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to resume with identical masks: tensors and ints by name. The model's own weights and the
        optimizer's state are saved by whoever trains."""
        tensors = {f"{kind}.{path}": t.clone() for kind, held in self.state.items() for path, t in held.items()}
        return {"method": self.method, "step": self.step, "total_steps": self.total_steps, **tensors}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state of a run with the same method, layers and number of steps; ``ValueError`` where it does not
        fit, and nothing is changed then. The model must hold the weights of that moment already."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            kind, _, path = name.partition(".")
            if path:
                found.setdefault(kind, {})[path] = value
        for kind in found.keys() | self.state.keys():
            if stray := sorted(found.get(kind, {}).keys() ^ self.configs.keys()):
                raise ValueError(f"{self.method}: the state is of other layers than the run, first {stray[0]}")
        for name, expected in (("method", self.method), ("total_steps", self.total_steps)):
            if state.get(name) != expected:
                raise ValueError(f"{self.method}: the state's {name} is {state.get(name)!r}, expected {expected!r}")
        step = state.get("step")
        if not isinstance(step, int) or not 0 <= step <= self.total_steps:
            raise ValueError(f"{self.method}: the state's step is {step!r}, expected 0 to {self.total_steps}")
        for kind, tensors in found.items():
            if kind not in self.kinds:
                raise ValueError(f"{self.method}: the state has {kind}, expected {', '.join(self.kinds) or 'none'}")
            for path, tensor in tensors.items():
                self._check(kind, path, tensor)
        self.step = step
        self.state = {
            kind: {path: tensor.to(self.weight(path).device, copy=True) for path, tensor in tensors.items()}
            for kind, tensors in found.items()
        }
        self.resumed()

    def resumed(self) -> None:  # noqa: B027 (a hook that few methods need)
        """Hook: ``step`` and ``state`` were loaded. Without gradient tracking."""

    @abstractmethod
    def finalize(self) -> CompressionPlan:
        """Makes the zeros exact, removes the hooks and all that the run put into the model, and returns the plan,
        verified."""

    def new_state(self, kind: str) -> dict[str, Tensor]:
        """Zeros of this kind for every layer, kept as state from now on."""
        self.state[kind] = {}
        for path in self.configs:
            shape, dtype = self.form(kind, path)
            self.state[kind][path] = torch.zeros(shape, dtype=dtype, device=self.weight(path).device)
        return self.state[kind]

    def form(self, kind: str, path: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the tensor of this kind for the layer at ``path``: what ``kinds`` says, unless a method's
        tensors differ from layer to layer."""
        wanted, weight = self.kinds[kind], self.weight(path)
        return () if wanted.scalar else tuple(weight.shape), wanted.dtype_for(weight)

    def finite_weight(self, path: str) -> Tensor:
        """The layer's weight, detached; ``ValueError`` naming the layer where it holds NaN or infinities."""
        weight = self.weight(path).detach()
        if not torch.isfinite(weight).all():
            raise ValueError(f"{self.method}: {path}: weight holds NaN or infinities")
        return weight

    def _follow(self) -> None:
        """Moves the state to where the weights are: a model may have moved since it was prepared."""
        for tensors in self.state.values():
            for path, tensor in tensors.items():
                tensors[path] = tensor.to(self.weight(path).device)

    def _check(self, kind: str, path: str, tensor: Tensor) -> None:
        shape, dtype = self.form(kind, path)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{self.method}: {path}: {kind} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}"
            )

    def _refuse_task_loss(self, gradient: Tensor) -> None:
        raise RuntimeError(
            f"{self.method}: outputs.loss was backpropagated, but this method replaces the task's loss; backpropagate "
            f"run.total_loss(outputs, inputs) alone"
        )

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        if self.needs_loss and not self._loss_added:
            raise RuntimeError(
                f"{self.method}: the method's loss was not part of this step; backpropagate "
                f"run.total_loss(outputs, inputs) in the loop, or train with sparsebert.hf.CompressionTrainer in place "
                f"of the Trainer"
            )
        # A fused optimizer is called also for a step that a loss scaler skips, and with gradients that are still
        # scaled where nobody has unscaled them to clip.
        found = getattr(optimizer, "found_inf", None)
        self._skips = found is not None and bool(found)
        if self._skips:
            return
        self._loss_added = False
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    parameter.grad.div_(scale.to(parameter.grad.device))
            optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.before_step(optimizer)

    @torch.no_grad()
    def _after(self) -> None:
        if self._skips:
            return
        self.step += 1
        self.after_step()
