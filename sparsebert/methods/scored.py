"""What methods share that prune by a score: how many weights are kept where, and a run whose masks only ever shrink.

``granularity`` says among which weights a score is compared. n:m layers always compare inside each group of m. Layers
with a ``BitmapConfig`` compare inside the matrix (``"matrix"``: each keeps its own density) or over all of them
together (``"global"``: one threshold, so that together they keep what their densities add up to, and the plan holds the
density that each came out with).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsebert.configs import BitmapConfig, NMConfig
from sparsebert.formats.bitmap import keep_count
from sparsebert.formats.common import largest_in_groups
from sparsebert.methods.base import Run
from sparsebert.methods.masked import MaskedRun, check_maskable
from sparsebert.methods.maths import schedules, thresholds
from sparsebert.plan import CompressionPlan, Selection

GRANULARITIES = ("global", "matrix")


def check_granularity(method: str, granularity: str) -> None:
    if granularity not in GRANULARITIES:
        raise ValueError(f"{method}: granularity is {granularity!r}, expected one of {', '.join(GRANULARITIES)}")


class Budget:
    """How many weights a run keeps: all of them at first, in the end what the configs say.

    While a schedule has ``left`` of its descent to come (1 to 0), of N weights with K to stay are kept
    K + floor((N - K) left), exactly: floor(r N) for r = K/N + (1 - K/N) left. Of a group of m are kept
    ceil(m (n/m + (1 - n/m) left)), never fewer than n.

    ``ValueError`` naming the layer for a config that is no mask, an ``NMConfig`` with columns, weights that hold NaN or
    infinities and, where ``gradients`` make the score, weights that do not require grad.
    """

    def __init__(self, run: Run, granularity: str, *, gradients: bool) -> None:
        check_granularity(run.method, granularity)
        check_maskable(run.method, run.configs)
        self.groups: dict[str, NMConfig] = {}
        # Layers whose scores are compared with each other, and how many weights they keep of how many.
        self.pools: list[tuple[list[str], int, int]] = []
        for path, config in run.configs.items():
            weight = run.finite_weight(path)
            if gradients and not run.weight(path).requires_grad:
                raise ValueError(
                    f"{run.method}: {path}: weight does not require grad, so it has no score; leave it out"
                )
            if isinstance(config, NMConfig):
                self.groups[path] = config
            elif isinstance(config, BitmapConfig):
                self.pools.append(([path], keep_count(config.density, *weight.shape), weight.numel()))
        if granularity == "global" and self.pools:
            paths = [path for pool, _, _ in self.pools for path in pool]
            self.pools = [(paths, sum(kept for _, kept, _ in self.pools), sum(total for *_, total in self.pools))]
        sizes = {path: run.weight(path).numel() for path in self.groups}
        self.total = sum(total for *_, total in self.pools) + sum(sizes.values())
        self.kept = sum(kept for _, kept, _ in self.pools) + sum(
            sizes[path] // config.m * config.n for path, config in self.groups.items()
        )

    @property
    def final(self) -> float:
        """The fraction of all weights that is kept in the end."""
        return self.kept / self.total

    def masks(self, scores: Mapping[str, Tensor], left: float) -> dict[str, Tensor]:
        """``True`` at the weights to keep, those with the largest scores; ties go to the earlier one."""
        found: dict[str, Tensor] = {}
        for paths, kept, total in self.pools:
            count = kept + int((total - kept) * left)
            found |= thresholds.largest_overall({path: scores[path] for path in paths}, count)
        for path, config in self.groups.items():
            n, m = config.n, config.m
            kept = schedules.kept_in_group(n / m + (1 - n / m) * left, n, m)
            found[path] = largest_in_groups(scores[path], kept, m)
        # In the order of the layers, whatever their configs are.
        return {path: found[path] for path in scores}

    def check_reached(self, run: Run, masks: Mapping[str, Tensor]) -> None:
        """``ValueError`` where more is kept than the configs say: the run is not at the end of its schedule."""
        kept = sum(int(mask.count_nonzero()) for mask in masks.values())
        if kept > self.kept:
            raise ValueError(
                f"{run.method}: {kept} weights are kept after step {run.step} of {run.total_steps}, expected "
                f"{self.kept}: the schedule has not reached its target"
            )


class ScoredRun(MaskedRun):
    """A ``MaskedRun`` that starts with nothing masked and takes ever more out, those with the smallest scores.

    What is out stays out. A subclass calls ``renew`` in ``after_step`` where masks are due, else ``apply_masks``.
    """

    def __init__(
        self, model: nn.Module, selection: Selection, total_steps: int, granularity: str, *, gradients: bool = True
    ) -> None:
        super().__init__(model, selection, total_steps)
        self.budget = Budget(self, granularity, gradients=gradients)
        if "mask" in self.kinds:
            for mask in self.new_state("mask").values():
                mask.fill_(True)

    def gradient(self, path: str) -> Tensor:
        """The gradient of the layer's weight, zeros where this step gave it none."""
        weight = self.weight(path)
        return torch.zeros_like(weight) if weight.grad is None else weight.grad

    def renew(self, scores: Mapping[str, Tensor], left: float) -> None:
        """New masks and what they drop, by scores of at least 0, which are overwritten where a weight is out."""
        for path in self.configs:
            # Below every score: a weight that is in may score 0 too, and must not lose to one that is out.
            scores[path].masked_fill_(self.mask(path).logical_not(), -1.0)
        self.keep(self.budget.masks(scores, left))
        self.apply_masks()

    def keep(self, masks: dict[str, Tensor]) -> None:
        """Holds these masks from now on."""
        self.state["mask"] = masks

    @torch.no_grad()
    def finalize(self) -> CompressionPlan:
        self.budget.check_reached(self, self.masks)
        return super().finalize()


class ScoredOnceRun(ScoredRun):
    """Gathers scores in the first ``batches`` steps, prunes once after them and trains the rest with the mask held.

    Nothing is trained while scores are gathered: the optimizer gets no gradients, so that neither a weight nor a moment
    moves, and every batch scores the weights that training starts from. A subclass has ``gather`` and ``scores``.
    """

    def __init__(
        self, model: nn.Module, selection: Selection, total_steps: int, granularity: str, *, batches: int
    ) -> None:
        super().__init__(model, selection, total_steps, granularity)
        if batches > total_steps:
            raise ValueError(f"{self.method}: batches is {batches}, expected at most the {total_steps} steps there are")
        self.batches = batches

    @abstractmethod
    def gather(self, count: int) -> None:
        """Adds the ``count``-th batch (from 1) to the scores."""

    @abstractmethod
    def scores(self) -> dict[str, Tensor]:
        """Path -> score, which may be overwritten."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.step >= self.batches:
            super().before_step(optimizer)
            return
        self.gather(self.step + 1)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def after_step(self) -> None:
        if self.step == self.batches:
            self.renew(self.scores(), 0.0)
        else:
            self.apply_masks()


def check_count(method: str, name: str, value: int | None, *, least: int = 1) -> None:
    """``ValueError`` unless ``value`` is None or a whole number of at least ``least``."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ValueError(f"{method}: {name} is {value!r}, expected a whole number, {least} or more")


def check_decay(method: str, name: str, value: float, *, one: bool = False) -> None:
    """``ValueError`` unless ``value`` can be the decay of a moving average: 0 to 1, 1 only where ``one``."""
    if not (0 <= value < 1 or (one and value == 1)):
        raise ValueError(f"{method}: {name} is {value}, expected 0 to {'1' if one else 'below 1'}")
