"""Pruning before training by |W * G|, a baseline in the manner of SNIP.

Lee, Ajanthan, Torr: SNIP: Single-shot Network Pruning based on Connection Sensitivity (ICLR 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsebert.methods.base import Kind, Method, Run
from sparsebert.methods.maths import scores
from sparsebert.methods.scored import ScoredOnceRun, check_count, check_granularity
from sparsebert.plan import Selection


class Snip(Method):
    """Sums |W * G| over the first ``batches`` steps, keeps the largest sums and trains the rest of the steps with that
    mask::

        s = sum over the batches of |W * dL/dW|,   M = [s among the largest]

    As in the paper the score is that of the weights training starts from: while scores are gathered no parameter moves,
    the optimizer gets no gradients and these steps train nothing. The paper scores one batch of a network at its
    random initialization; several batches, their absolute values summed, and a pre-trained network are ours.

    ``granularity``: ``"global"`` as in the paper, one threshold for all layers with a ``BitmapConfig``, or
    ``"matrix"``; in an ``NMConfig`` layer each group keeps its largest. ``prepare``: ``ValueError`` where the training
    has fewer steps than ``batches``, for a config that is no mask, an ``NMConfig`` with columns, and weights that do
    not require grad. ``finalize``: ``ValueError`` before the weights are pruned.
    """

    def __init__(self, config: Selection, *, granularity: str = "global", batches: int = 10) -> None:
        super().__init__(config)
        check_granularity("Snip", granularity)
        check_count("Snip", "batches", batches)
        self.granularity = granularity
        self.batches = batches

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        self._refuse_teacher(teacher)
        return SnipRun(model, self.config, total_steps, self.granularity, batches=self.batches)


class SnipRun(ScoredOnceRun):
    kinds = {**ScoredOnceRun.kinds, "sum": Kind(torch.float32)}

    def __init__(
        self, model: nn.Module, selection: Selection, total_steps: int, granularity: str, *, batches: int
    ) -> None:
        super().__init__(model, selection, total_steps, granularity, batches=batches)
        self.new_state("sum")

    def gather(self, count: int) -> None:
        for path, total in self.state["sum"].items():
            total.add_(scores.sensitivity(self.weight(path), self.gradient(path)))

    def scores(self) -> dict[str, Tensor]:
        return self.state["sum"]
