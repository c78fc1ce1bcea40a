"""Knowledge-aware pruning: a pre-trained student is pruned while it learns everything from its fine-tuned teacher.

Xu, Yen, Zhao, Xiao: Rethinking Network Pruning - under the Pre-train and Fine-tune Paradigm (NAACL 2021), "SparseBERT".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsebert.configs import NMConfig
from sparsebert.formats import bitmap
from sparsebert.formats.common import largest_in_groups
from sparsebert.methods.base import Method, Run
from sparsebert.methods.capture import Capture
from sparsebert.methods.masked import MaskedRun, check_maskable, kept_fraction
from sparsebert.methods.maths import distillation, scores, thresholds
from sparsebert.methods.maths.schedules import Updates, kept_in_group
from sparsebert.methods.teacher import Teacher, check_teacher
from sparsebert.plan import CompressionPlan, Selection

TERMS = ("embedding", "hidden", "attention", "logits")


class KnowledgePruning(Method):
    """Prunes by magnitude, a little at a time, while the student imitates the teacher layer by layer::

        loss = MSE(H_0) + sum over l of MSE(H_l) + sum over l of MSE(A_l) + soft cross entropy of the logits / T
        t % f == 0:   M = the largest |W * M| of each matrix, so many as the schedule r(t) keeps
        every step:   W <- W * M

    H_0 is the output of the embeddings, H_l that of layer l, A_l its attention scores before the softmax, with
    padding and scores of -100 or less as 0 on each side; the means are over all entries, those of padding too. The
    cross entropy is the mean over batch *and* classes. A head with one output learns its labels instead (mean squared
    error), as published. ``model`` is meant to be the pre-trained encoder with a new head, ``teacher`` the same
    architecture fine-tuned.

    ``config``: ``BitmapConfig`` (the paper: density 0.05 in each matrix) or ``NMConfig`` without columns, or a mapping.
    On the way to n:m each group keeps the whole number nearest to r(t) m (our choice; the paper prunes single weights).
    ``updates``: about how often masks are renewed (``schedules.Updates``; published code: 100); each costs about what
    sorting out every weight does, so take fewer where a training has only some hundred steps.
    ``terms``: which of the four there are, ``weights``: factors on them by name, 1 where none is given (published: all
    terms, no factors). ``temperature``: T (published: 1). ``cooldown``: the fraction of the steps at the end in which
    the target is held (published: 0).
    ``task_loss``: whether the task's own loss is added; published, and by default, the labels of classes are not used.

    Differs from the published code: the teacher is always in evaluation mode (it is in training mode there, with
    dropout in the targets), the last update always comes, and trainings of any length have a schedule.
    """

    def __init__(
        self,
        config: Selection,
        *,
        updates: int = 100,
        terms: Sequence[str] = TERMS,
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        cooldown: float = 0.0,
        task_loss: bool = False,
    ) -> None:
        super().__init__(config)
        name = type(self).__name__
        if not isinstance(updates, int) or isinstance(updates, bool) or updates < 1:
            raise ValueError(f"{name}: updates is {updates!r}, expected a positive int")
        if isinstance(terms, str) or not terms or len(set(terms)) < len(terms) or not set(terms) <= set(TERMS):
            raise ValueError(f"{name}: terms is {terms!r}, expected some of {', '.join(TERMS)}, each once")
        given = dict(weights or {})
        for term, factor in given.items():
            if term not in terms or not (math.isfinite(factor) and factor >= 0):
                raise ValueError(
                    f"{name}: weights has {term!r}: {factor!r}, expected factors of at least 0 on terms that are used "
                    f"({', '.join(terms)})"
                )
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"{name}: temperature is {temperature!r}, expected above 0")
        if not 0 <= cooldown < 1:
            raise ValueError(f"{name}: cooldown is {cooldown!r}, expected at least 0 and below 1")
        self.updates = updates
        self.factors = {term: float(given.get(term, 1.0)) for term in TERMS if term in terms}
        self.temperature = temperature
        self.cooldown = cooldown
        self.task_loss = task_loss

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        """``teacher`` is required: another model of the same depth, width and vocabulary. It keeps its weights and its
        mode, and is moved to the student's device when the run is attached."""
        if teacher is None:
            raise ValueError(f"{type(self).__name__}: needs a teacher; pass teacher=, the fine-tuned model")
        return KnowledgePruningRun(model, self, total_steps, teacher)


class KnowledgePruningRun(MaskedRun):
    needs_loss = True

    @torch.no_grad()
    def __init__(self, model: nn.Module, options: KnowledgePruning, total_steps: int, teacher: nn.Module) -> None:
        super().__init__(model, options.config, total_steps)
        self.options = options
        self.replaces_task_loss = not options.task_loss
        check_maskable(self.method, self.configs)
        end = int(options.cooldown * total_steps)
        self.schedules: dict[str, Updates] = {}
        for path, config in self.configs.items():
            self.finite_weight(path)
            self.schedules[path] = Updates(kept_fraction(config), total_steps, options.updates, end)
        self._check_pair(teacher)
        wanted = {
            "hidden": "embedding" in options.factors or "hidden" in options.factors,
            "attention": "attention" in options.factors,
        }
        self._student = Capture(model, **wanted)
        self.teacher = Teacher(teacher, **wanted)
        self._last: dict[str, Tensor] = {}
        for mask in self.new_state("mask").values():
            mask.fill_(True)

    def attach(self, optimizer: torch.optim.Optimizer) -> Run:
        super().attach(optimizer)
        self._student.attach()
        return self

    def detach(self) -> None:
        super().detach()
        self._student.detach()

    def added_loss(self, outputs: Any, inputs: Any) -> Tensor:
        ours = self._student.take(outputs)
        theirs, answer = self.teacher.ask(inputs)
        mask = inputs.get("attention_mask")
        found: dict[str, Tensor] = {}
        for term in self.options.factors:
            if term == "embedding":
                found[term] = distillation.hidden_state_loss(ours.hidden_states[:1], theirs.hidden_states[:1])
            elif term == "hidden":
                found[term] = distillation.hidden_state_loss(ours.hidden_states[1:], theirs.hidden_states[1:])
            elif term == "attention":
                found[term] = distillation.attention_score_loss(ours.attention_scores, theirs.attention_scores, mask)
            else:
                found[term] = self._logits_loss(outputs, answer, inputs)
        self._last = {term: value.detach() for term, value in found.items()}
        parts = [factor * found[term] for term, factor in self.options.factors.items()]
        return torch.stack(parts).sum()

    def after_step(self) -> None:
        for path, schedule in self.schedules.items():
            if schedule.due(self.step):
                self.masks[path] = self._renewed(path, schedule.remaining(self.step))
        self.apply_masks()

    def metrics(self) -> dict[str, float]:
        """``sparsity``, and ``loss_`` and the term's name: each term of the last loss, before its factor."""
        return {**super().metrics(), **{f"loss_{term}": float(value) for term, value in self._last.items()}}

    @torch.no_grad()
    def finalize(self) -> CompressionPlan:
        """As in every method; ``ValueError`` where the training ended well before its target. Steps that a loss scaler
        skipped do not count, so the last updates may be missing: they are made here where 1 % more than the target is
        left, or less."""
        for path, schedule in self.schedules.items():
            if schedule.remaining(self.step) > 1.01 * schedule.final:
                raise ValueError(
                    f"{self.method}: {self.step} steps are done, but the target is reached at step {schedule.last} of "
                    f"{self.total_steps}; train on, or prepare the run with as many steps as there are"
                )
            if self.step < schedule.last:
                self.masks[path] = self._renewed(path, schedule.final)
        return super().finalize()

    def _renewed(self, path: str, remaining: float) -> Tensor:
        config, weight, mask = self.configs[path], self.weight(path), self.masks[path]
        # A weight that is out must stay below one that is in and happens to be zero.
        score = scores.magnitude(weight).masked_fill_(mask.logical_not(), -1.0)
        if isinstance(config, NMConfig):
            # The nearest count: rounded up, the last of the n + 1 would go with the last step, and nothing be left of
            # the training to make up for it.
            kept = kept_in_group(remaining - 0.5 / config.m, config.n, config.m)
            return largest_in_groups(score, kept, config.m)
        least = bitmap.keep_count(config.density, *weight.shape)  # type: ignore[union-attr]
        return thresholds.largest(score, max(least, int(weight.numel() * remaining)))

    def _logits_loss(self, outputs: Any, answer: Any, inputs: Any) -> Tensor:
        ours, theirs = getattr(outputs, "logits", None), getattr(answer, "logits", None)
        if ours is None or theirs is None:
            raise ValueError(self._no_logits(self.model if ours is None else self.teacher.model))
        problem = getattr(getattr(self.model, "config", None), "problem_type", None)
        if ours.shape[-1] == 1 or problem == "regression":
            if (labels := inputs.get("labels")) is None:
                raise ValueError(
                    f"{self.method}: term 'logits': a regression learns from the labels, but the inputs have none"
                )
            ours = distillation.widened(ours).flatten()
            return F.mse_loss(ours, labels.flatten().to(ours.dtype))
        if problem == "multi_label_classification":
            raise ValueError(
                f"{self.method}: term 'logits': the classes of {type(self.model).__name__} do not exclude each other "
                f"(multi_label_classification), as a softmax would have it; leave the term out"
            )
        mask = inputs.get("attention_mask")
        if ours.dim() == 3 and mask is not None:
            # A class for each token: padding has none.
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        return distillation.soft_cross_entropy(ours, theirs, self.options.temperature)

    def _no_logits(self, model: nn.Module) -> str:
        return (
            f"{self.method}: term 'logits': {type(model).__name__} has no logits; leave it out, as in "
            f'terms=("embedding", "hidden", "attention")'
        )

    def _check_pair(self, teacher: nn.Module) -> None:
        terms = self.options.factors
        names = ["num_hidden_layers", "hidden_size", "vocab_size"]
        names += ["num_attention_heads"] * ("attention" in terms) + ["num_labels"] * ("logits" in terms)
        check_teacher(self.method, self.model, teacher, names)
        for one in (self.model, teacher):
            # A Hugging Face model without a head is its own base model.
            if "logits" in terms and getattr(one, "base_model", None) is one:
                raise ValueError(self._no_logits(one))

    def _follow(self) -> None:
        super()._follow()
        self.teacher.to(next(self.model.parameters()).device)
