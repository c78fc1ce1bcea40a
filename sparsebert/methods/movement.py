"""Movement pruning: learned scores say which weights stay.

Sanh, Wolf, Rush: Movement Pruning: Adaptive Sparsity by Fine-Tuning (NeurIPS 2020), its hard variant, with the defaults
of the published code's SQuAD recipe.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparsebert.configs import BitmapConfig
from sparsebert.formats.bitmap import keep_count
from sparsebert.formats.common import largest_in_groups
from sparsebert.methods.base import Kind, Method, Run
from sparsebert.methods.masked import MaskedRun, check_maskable, kept_fraction
from sparsebert.methods.maths.adam import adam_step_
from sparsebert.methods.maths.schedules import Cubic, kept_in_group
from sparsebert.methods.maths.thresholds import largest
from sparsebert.methods.straight_through import hide_, reveal_
from sparsebert.plan import CompressionPlan, Selection


class Movement(Method):
    """Keeps the weights that training moves away from zero, by a score S learned for each of them.

    The model computes with W' = M * W, where M holds the largest scores of each matrix (``BitmapConfig``) or of each
    group (``NMConfig`` without columns); scores have a sign, and no absolute value is taken. S starts at 0. With
    G = dL/dW'::

        dL/dS = G * W        (straight through the choice of the largest)
        dL/dW = G * M

    A weight that is out gets no gradient, but its score goes on learning from G, so it may return, with the value that
    it left with. All the same the optimizer moves it a little: for some steps by the momentum it came with, and always
    by weight decay, which the published training does not use.

    How much is kept falls along ``schedules.Cubic`` from all to the config's density, or n of m in whole steps.

    - ``score_lr``: S is trained by AdamW (betas 0.9 and 0.999, eps 1e-8, no decay) at this rate, 1e-2 as published,
      times the factor that a scheduler puts on the rate of the weight's own group: lr / initial_lr.
    - ``start``, ``end``: steps before and after the descent; None is a tenth (at least 1) and a fifth of the training,
      which are the proportions of the published recipe. ``start`` is at least 1: all scores are equal until then.
    - ``every``: masks are renewed every so many steps of the training and where the descent and the training end. The
      published code does it at every step (1). At the default 10, which is our choice, a weight leaves or returns up to
      9 steps late, and a step costs less: finding the thresholds takes longer than all else here.

    Besides, this differs from the published code: there the norm of all gradients, scores included, is clipped to 1,
    so that scores shrink the weights' gradients; here clipping is the loop's, sees G at every entry, and dL/dS comes
    from the clipped G. Scores are not clipped themselves (Adam is nearly blind to their scale).

    A run keeps 4.25 floats for each weight: S and its two moments, what M hides, and M.

    ``prepare`` refuses, with ``ValueError``, weights that hold NaN or are frozen, configs that are no mask, and a
    schedule that does not fit ``total_steps``.
    """

    def __init__(
        self,
        config: Selection,
        *,
        score_lr: float = 1e-2,
        start: int | None = None,
        end: int | None = None,
        every: int = 10,
    ) -> None:
        super().__init__(config)
        if not (math.isfinite(score_lr) and score_lr > 0):
            raise ValueError(f"Movement: score_lr is {score_lr}, expected a number above 0")
        if start is not None and start < 1:
            raise ValueError(f"Movement: start is {start} steps, expected at least 1: scores are all equal before it")
        self.score_lr = score_lr
        self.start = start
        self.end = end
        self.every = every

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        self._refuse_teacher(teacher)
        return MovementRun(model, self, total_steps)


class MovementRun(MaskedRun):
    # Between steps the weights hold M * W, and "hidden" (1 - M) * W; inside a step the weights are dense.
    kinds = {
        "mask": Kind(torch.bool),
        "hidden": Kind(),
        "score": Kind(wide=True),
        "score_mean": Kind(wide=True),
        "score_square": Kind(wide=True),
    }

    def __init__(self, model: nn.Module, method: Movement, total_steps: int) -> None:
        super().__init__(model, method.config, total_steps)
        check_maskable(self.method, self.configs)
        self.score_lr = method.score_lr
        start = max(1, total_steps // 10) if method.start is None else method.start
        end = total_steps // 5 if method.end is None else method.end
        self._schedules: dict[str, Cubic] = {}
        for path, config in self.configs.items():
            self._schedules[path] = Cubic(kept_fraction(config), total_steps, start, end, method.every)
            self.finite_weight(path)
            if not self.weight(path).requires_grad:
                raise ValueError(f"{self.method}: {path}: weight is frozen, and scores learn from its gradient")
        for kind in self.kinds:
            self.new_state(kind)
        for mask in self.masks.values():
            mask.fill_(True)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        rates = {id(p): _rate_factor(group) for group in optimizer.param_groups for p in group["params"]}
        products: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}
        for path, mask in self.masks.items():
            weight = self.weight(path)
            reveal_(weight, self.state["hidden"][path])
            if (gradient := weight.grad) is None:
                continue
            score = self.state["score"][path]
            # Layers of one shape share the memory of the product.
            key = (score.shape, score.dtype, score.device)
            product = products.setdefault(key, torch.empty(0, dtype=score.dtype, device=score.device))
            torch.mul(gradient.to(score.dtype), weight, out=product.resize_(score.shape))
            # Old weights and old scores, as if one optimizer trained both.
            adam_step_(
                score,
                product,
                self.state["score_mean"][path],
                self.state["score_square"][path],
                step=self.step + 1,
                lr=self.score_lr * rates.get(id(weight), 1.0),
            )
            gradient.mul_(mask)

    def after_step(self) -> None:
        try:
            if self._due():
                self._renew_masks()
        finally:
            for path, mask in self.masks.items():
                hide_(self.weight(path), mask, self.state["hidden"][path])

    @torch.no_grad()
    def finalize(self) -> CompressionPlan:
        """The plan of the target. ``ValueError`` where the training ended before the schedule reached it; the run can
        go on then."""
        schedule = next(iter(self._schedules.values()))
        if self.step < (least := self.total_steps - schedule.end):
            raise ValueError(
                f"{self.method}: finalized after {self.step} steps, but the target is reached after {least} of "
                f"{self.total_steps}"
            )
        self.apply_masks()
        self.detach()
        self.state = {"mask": self.masks}
        plan = CompressionPlan(self.configs)
        plan.verify(self.model)
        return plan

    def _due(self) -> bool:
        schedule = next(iter(self._schedules.values()))
        if self.step <= schedule.start:
            return False
        return self.step % schedule.every == 0 or self.step in (self.total_steps - schedule.end, self.total_steps)

    def _renew_masks(self) -> None:
        masks = {}
        for path, score in self.state["score"].items():
            config, remaining = self.configs[path], self._schedules[path].remaining(self.step)
            if isinstance(config, BitmapConfig):
                count = keep_count(remaining, *score.shape)
                whole = count == score.numel()
            else:
                count = kept_in_group(remaining, config.n, config.m)  # type: ignore[union-attr]
                whole = count == config.m  # type: ignore[union-attr]
            if whole:
                masks[path] = torch.ones_like(self.masks[path])
                continue
            if not score.any():
                raise RuntimeError(
                    f"{self.method}: {path}: all scores are 0 after {self.step} steps, so there is nothing to choose "
                    f"by: no gradient reached this weight, or the learning rate was 0"
                )
            if isinstance(config, BitmapConfig):
                masks[path] = largest(score, count)
            else:
                masks[path] = largest_in_groups(score, count, config.m)  # type: ignore[union-attr]
        self.state["mask"] = masks


def _rate_factor(group: dict) -> float:
    """What a scheduler has made of the group's learning rate, 1 where there is none."""
    first, now = group.get("initial_lr"), group.get("lr")
    return float(now) / float(first) if first and now is not None else 1.0
