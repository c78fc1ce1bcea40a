"""Training factors whose structure is fixed: u and v, and of S the rows or entries that are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.configs import LowRankConfig, LowRankSparseConfig, RowsConfig
from sparsebert.methods.base import Kind, Method, Run
from sparsebert.methods.capture import Capture
from sparsebert.methods.factored import FactoredRun
from sparsebert.methods.masked import drop_
from sparsebert.methods.maths import distillation
from sparsebert.methods.teacher import Teacher, check_teacher
from sparsebert.plan import CompressionPlan, Selection


class FixedFactorsRun(FactoredRun):
    """u, v and S are trained; what is zero in S stays so: G <- M * G before a step and S <- M * S after it, M being
    the rows of S with a non-zero (``RowsConfig``) or its non-zeros."""

    # (out, 1) for rows, (out, in) for entries, (0,) where a layer has no S.
    kinds = {"mask": Kind(torch.bool)}

    def __init__(self, model: nn.Module, selection: Selection, total_steps: int) -> None:
        super().__init__(model, selection, total_steps)
        for path, config in self.configs.items():
            if not isinstance(config, LowRankConfig | LowRankSparseConfig):
                raise ValueError(
                    f"{self.method}: {path}: {config} is not made of factors; expected a LowRankConfig or a "
                    f"LowRankSparseConfig"
                )

    def factor_all(self, factors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.state["mask"] = {path: self._mask(path, factors[path].get("sparse")) for path in self.configs}
        super().factor_all(factors)

    def form(self, kind: str, path: str) -> tuple[tuple[int, ...], torch.dtype]:
        config = self.configs[path]
        if isinstance(config, LowRankConfig):
            return (0,), torch.bool
        layer = self.model.get_submodule(path)
        width = 1 if isinstance(config.sparse, RowsConfig) else layer.in_features  # type: ignore[union-attr]
        return (layer.out_features, width), torch.bool  # type: ignore[return-value]

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        for path, mask in self.state["mask"].items():
            sparse = self.sparse(path)
            if sparse is not None and sparse.grad is not None:
                sparse.grad.mul_(mask)

    def after_step(self) -> None:
        self.apply_masks()

    @torch.no_grad()
    def apply_masks(self) -> None:
        for path, mask in self.state["mask"].items():
            if (sparse := self.sparse(path)) is not None:
                drop_(sparse, mask)

    def resumed(self) -> None:
        self.apply_masks()

    @torch.no_grad()
    def finalize(self) -> CompressionPlan:
        self.apply_masks()
        return super().finalize()

    def _mask(self, path: str, sparse: Tensor | None) -> Tensor:
        if sparse is None:
            return torch.zeros(0, dtype=torch.bool, device=self.weight(path).device)
        alive = sparse != 0
        return alive if self.form("mask", path)[0][1] > 1 else alive.any(1, keepdim=True)


class FactorTuning(Method):
    """Trains the factors of a finished plan further, perhaps with a teacher: LoSparse's second run, its distillation.

    ``plan`` is what ``finalize`` of ``LoSparse``, ``LPAF`` or ``SVD`` returned, all of its layers made of factors. u, v
    and what is there of S are trained; the structure stays. With a teacher ``run.loss`` adds::

        alpha_output T² KL(softmax(z' / T) || softmax(z / T)) + alpha_hidden sum_l MSE(H_l, H'_l)

    with z the student's logits, z' the teacher's, T ``temperature``, and H_l the hidden states: the output of the
    embeddings and of every layer. ``alpha_output`` 0 and ``alpha_hidden`` 15 are those of the published MNLI script, T
    2 that of its code. Without a teacher this is plain fine-tuning, and ``run.loss`` is zero.

    The student's mode is the training loop's, which must call ``model.train()`` after an evaluation: a loss of a
    forward in evaluation mode is a ``RuntimeError`` (in the published script the student is in that mode most of the
    time). The teacher is asked in evaluation mode, and is moved to the student's device when the run is attached.

    ``ValueError`` in ``prepare``: a plan that does not hold for the model, or a teacher whose layers do not match.
    """

    def __init__(
        self,
        plan: CompressionPlan,
        *,
        alpha_output: float = 0.0,
        alpha_hidden: float = 15.0,
        temperature: float = 2.0,
    ) -> None:
        if not isinstance(plan, CompressionPlan):
            raise TypeError(f"FactorTuning: plan is {type(plan).__name__}, expected a CompressionPlan")
        super().__init__(plan.layers)
        for name, value in (("alpha_output", alpha_output), ("alpha_hidden", alpha_hidden)):
            if not value >= 0:
                raise ValueError(f"FactorTuning: {name} is {value}, expected 0 or more")
        if not temperature > 0:
            raise ValueError(f"FactorTuning: temperature is {temperature}, expected above 0")
        self.plan = plan
        self.alpha_output, self.alpha_hidden, self.temperature = alpha_output, alpha_hidden, temperature

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        if teacher is not None:
            if not self.alpha_output and not self.alpha_hidden:
                raise ValueError("FactorTuning: alpha_output and alpha_hidden are 0, expected no teacher then")
            # Hidden states are compared layer by layer.
            names = ("hidden_size", "num_hidden_layers") if self.alpha_hidden else ()
            check_teacher("FactorTuning", model, teacher, names)
        self.plan.verify(model)
        return FactorTuningRun(model, self, total_steps, teacher)


class FactorTuningRun(FixedFactorsRun):
    @torch.no_grad()
    def __init__(self, model: nn.Module, options: FactorTuning, total_steps: int, teacher: nn.Module | None) -> None:
        super().__init__(model, options.config, total_steps)
        for path in options.plan.layers:
            if path not in self.configs:
                raise ValueError(f"FactorTuning: {path}: {self.skipped[path]}")
        self.options = options
        self.teacher: Teacher | None = None
        self.needs_loss = teacher is not None
        self.factor_all(
            {
                path: {name: part.detach().to(self.weight(path), copy=True) for name, part in parts.items()}
                for path, parts in options.plan.factors.items()
            }
        )
        if teacher is not None:
            hidden = options.alpha_hidden > 0
            self.teacher = Teacher(teacher, hidden=hidden)
            self._student = Capture(model, hidden=hidden, attention=False)

    def attach(self, optimizer: torch.optim.Optimizer) -> Run:
        super().attach(optimizer)
        if self.teacher is not None:
            self._student.attach()
        return self

    def detach(self) -> None:
        super().detach()
        if self.teacher is not None:
            self._student.detach()

    def added_loss(self, outputs: Any, inputs: Any) -> Tensor:
        total = super().added_loss(outputs, inputs)
        if self.teacher is None:
            return total
        options = self.options
        ours = self._student.take(outputs)
        theirs, answer = self.teacher.ask(inputs)
        if options.alpha_output:
            total = total + options.alpha_output * distillation.kl_divergence(
                _logits(outputs, "student"), _logits(answer, "teacher"), options.temperature
            )
        if options.alpha_hidden:
            total = total + options.alpha_hidden * distillation.hidden_state_loss(
                ours.hidden_states, theirs.hidden_states
            )
        return total

    def _follow(self) -> None:
        super()._follow()
        if self.teacher is not None:
            self.teacher.to(next(self.model.parameters()).device)


def _logits(outputs: Any, whose: str) -> Tensor:
    if (found := getattr(outputs, "logits", None)) is None:
        raise RuntimeError(f"FactorTuning: the {whose}'s outputs have no logits, which the loss needs")
    return found
