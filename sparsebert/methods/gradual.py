"""Gradual magnitude pruning, a baseline: ever more of the smallest |w| are taken out while the model trains.

Zhu, Gupta: To prune, or not to prune: exploring the efficacy of pruning for model compression (2017).
"""

from __future__ import annotations

from torch import nn

from sparsebert.methods.base import Method, Run
from sparsebert.methods.maths import scores
from sparsebert.methods.maths.schedules import Cubic
from sparsebert.methods.scored import ScoredRun, check_granularity
from sparsebert.plan import Selection


class GradualMagnitude(Method):
    """Keeps the largest |w| of each matrix (``NMConfig``: of each group), ever fewer of them along a cubic curve::

        r(t) = f + (1 - f) (1 - (t - start) / (T - start - end))^3,   f the density of the layer

    What is out stays out: it is zero, and its gradient does not reach the optimizer.

    ``granularity``: ``"matrix"`` or ``"global"``, one threshold for all layers with a ``BitmapConfig``. ``start`` and
    ``end``: steps without pruning before and at the target after the descent; by default a tenth and a fifth of the
    training, the shares that movement pruning's published recipe for SQuAD has. ``every``: masks are renewed every so
    many steps, the last time at the target; 10 is our choice.

    ``prepare``: ``ValueError`` for a schedule that does not fit the training, a config that is no mask and an
    ``NMConfig`` with columns. ``finalize``: ``ValueError`` before the target is reached.
    """

    def __init__(
        self,
        config: Selection,
        *,
        granularity: str = "matrix",
        start: int | None = None,
        end: int | None = None,
        every: int = 10,
    ) -> None:
        super().__init__(config)
        check_granularity("GradualMagnitude", granularity)
        self.granularity = granularity
        self.start = start
        self.end = end
        self.every = every

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        self._refuse_teacher(teacher)
        return GradualMagnitudeRun(model, self, total_steps)


class GradualMagnitudeRun(ScoredRun):
    def __init__(self, model: nn.Module, options: GradualMagnitude, total_steps: int) -> None:
        super().__init__(model, options.config, total_steps, options.granularity, gradients=False)
        self.schedule = cubic(self.budget.final, total_steps, options.start, options.end, options.every)

    def after_step(self) -> None:
        if self.schedule.falls(self.step):
            magnitudes = {path: scores.magnitude(self.weight(path)) for path in self.configs}
            self.renew(magnitudes, self.schedule.left(self.step))
        else:
            self.apply_masks()


def cubic(final: float, total_steps: int, start: int | None, end: int | None, every: int) -> Cubic:
    """A cubic schedule that by default waits for a tenth of the steps and ends with a fifth of them at the target."""
    start = total_steps // 10 if start is None else start
    end = total_steps // 5 if end is None else end
    return Cubic(final, total_steps, start, end, every)
