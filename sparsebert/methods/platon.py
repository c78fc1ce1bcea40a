"""PLATON: weights are kept whose |W * G| is large on average, or still uncertain.

Zhang, Zuo, Liang, Bukharin, He, Chen, Zhao: PLATON: Pruning Large Transformer Models with Upper Confidence Bound of
Weight Importance (ICML 2022), after its published code.
"""

from __future__ import annotations

import torch
from torch import nn

from sparsebert.methods.base import Kind, Method, Run
from sparsebert.methods.gradual import cubic
from sparsebert.methods.masked import configs_of_masks
from sparsebert.methods.maths import scores
from sparsebert.methods.scored import Budget, check_count, check_decay, check_granularity
from sparsebert.plan import CompressionPlan, Selection


class Platon(Method):
    """Zeroes the weights with the smallest product of smoothed importance and uncertainty; they keep their gradients
    and may return.

    After each step, with the new W and the gradient G that led to it, I is the mean of |W * G| over the ``window`` so
    far. At the start of the next window, before its first sample ::

        S <- b1 S + (1 - b1) I        U <- b2 U + (1 - b2) |I - S|, with the new S        score = S * U

    and of the scores of all N selected weights the largest r N are kept, r the cubic schedule of ``GradualMagnitude``:
    the others are set to 0 in the weight, without a mask that lasts. Up to ``start`` and between the starts of windows
    nothing is set to 0; in the last ``end`` steps it is done after every step, with one decision for each window, since
    its scores stand still.

    Options:

    - ``granularity``: ``"global"`` as published, one threshold for all layers with a ``BitmapConfig``, or ``"matrix"``;
      in an ``NMConfig`` layer each group keeps its largest.
    - ``beta1``, ``beta2``: b1 and b2. The published recipes for GLUE have 0.85 and, by task, 0.65 to 0.95. With
      ``beta2=1`` the score is S alone.
    - ``window``: steps of a window, at least 2, published 10.
    - ``start``, ``end``: steps before and after the descent, by default a tenth and a fifth of the training, our choice
      (published per task).

    From the published code this differs so: its first window averages a zero that no step gave, with the samples of
    steps 1 to 9, here it averages the samples; it keeps one weight more than r N, and all ties at the threshold, here
    the largest r N exactly, ties going to the earlier one; it prunes the biases of the layers as well.

    Between the starts of windows the model computes with weights that have begun to return: up to the last ``end``
    steps an evaluation sees a denser model than the schedule says, and ``metrics`` tells both (``sparsity`` and
    ``masked``, the fraction taken out by the last decision).

    ``prepare``: ``ValueError`` for a schedule that does not fit, or that would prune before the first window is full,
    a config that is no mask, an ``NMConfig`` with columns and weights that do not require grad. ``finalize``:
    ``ValueError`` before the target is reached. Three floats a weight are kept (I, S, U); where the last ``end`` steps
    begin in the middle of a window, a fourth for a moment.
    """

    def __init__(
        self,
        config: Selection,
        *,
        granularity: str = "global",
        beta1: float = 0.85,
        beta2: float = 0.95,
        window: int = 10,
        start: int | None = None,
        end: int | None = None,
    ) -> None:
        super().__init__(config)
        check_granularity("Platon", granularity)
        check_decay("Platon", "beta1", beta1)
        check_decay("Platon", "beta2", beta2, one=True)
        check_count("Platon", "window", window, least=2)
        self.granularity = granularity
        self.beta1 = beta1
        self.beta2 = beta2
        self.window = window
        self.start = start
        self.end = end

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        self._refuse_teacher(teacher)
        return PlatonRun(model, self, total_steps)


class PlatonRun(Run):
    kinds = {
        "mean": Kind(torch.float32),
        # Its sign, also that of -0.0, is what the last decision keeps: a mask would be one more number a weight.
        "smoothed": Kind(torch.float32),
        "uncertainty": Kind(torch.float32),
    }

    def __init__(self, model: nn.Module, options: Platon, total_steps: int) -> None:
        super().__init__(model, options.config, total_steps)
        self.budget = Budget(self, options.granularity, gradients=True)
        self.schedule = cubic(self.budget.final, total_steps, options.start, options.end, options.window)
        self.options = options
        # The first step that sets weights to zero for good, and the earliest that may do so off a window's start.
        self.last_phase = min(total_steps, total_steps - self.schedule.end + 1)
        if self.last_phase < options.window:
            raise ValueError(
                f"{self.method}: weights are pruned for good from step {self.last_phase} of {total_steps} on, before a "
                f"first window of {options.window} steps has given scores"
            )
        for kind in self.kinds:
            if kind != "uncertainty" or options.beta2 < 1:
                self.new_state(kind)

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """Path -> bool ``(out_features, in_features)``, True where the last decision keeps a weight."""
        return {path: smoothed.signbit().logical_not_() for path, smoothed in self.state["smoothed"].items()}

    def after_step(self) -> None:
        place = self.step % self.options.window
        due = self.schedule.due(self.step)
        if place == 0:
            self._close_window()
            if due:
                # I went into S: its memory is free for the scores until the window's first sample.
                self._decide(self.state["mean"])
        # Steps count from 1, so the first window is one sample short.
        count = self.step if self.step < self.options.window else place + 1
        for path, mean in self.state["mean"].items():
            weight = self.weight(path)
            if count == 1:
                mean.zero_()
            if weight.grad is None:
                scores.update_mean_(mean, torch.zeros_like(mean), count)
            else:
                scores.update_mean_(mean, scores.sensitivity(weight, weight.grad).to(mean.dtype), count)
        if due:
            if place and self.step == self.last_phase:
                self._decide({path: torch.empty_like(mean) for path, mean in self.state["mean"].items()})
            self._zero()

    def _close_window(self) -> None:
        for path, mean in self.state["mean"].items():
            scores.update_platon_(
                self.state["smoothed"][path].abs_(),
                self._uncertainty(path),
                mean,
                beta1=self.options.beta1,
                beta2=self.options.beta2,
            )

    def _decide(self, found: dict[str, torch.Tensor]) -> None:
        """What stays, by the scores, which are written into ``found``."""
        for path, score in found.items():
            torch.abs(self.state["smoothed"][path], out=score)
            if (uncertainty := self._uncertainty(path)) is not None:
                score.mul_(uncertainty)
        for path, mask in self.budget.masks(found, self.schedule.left(self.step)).items():
            smoothed = self.state["smoothed"][path].abs_()
            smoothed.copy_(torch.where(mask, smoothed, smoothed.neg()))

    def _uncertainty(self, path: str) -> torch.Tensor | None:
        return self.state["uncertainty"][path] if self.options.beta2 < 1 else None

    def _zero(self) -> None:
        for path, smoothed in self.state["smoothed"].items():
            self.weight(path).masked_fill_(smoothed.signbit(), 0.0)

    def metrics(self) -> dict[str, float]:
        kept = sum(int(mask.count_nonzero()) for mask in self.masks.values())
        return {**super().metrics(), "masked": 1 - kept / self.budget.total}

    @torch.no_grad()
    def finalize(self) -> CompressionPlan:
        self.budget.check_reached(self, self.masks)
        self._zero()
        self.detach()
        plan = CompressionPlan(configs_of_masks(self.configs, self.masks))
        plan.verify(self.model)
        return plan
