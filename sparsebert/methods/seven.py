"""SEVEN: weights are kept whose gradients are large and steady.

Xiao, Li, Nie, Tang: SEVEN: Pruning Transformer Model by Reserving Sentinels (IJCNN 2024), after its published code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsebert.methods.base import Kind, Method, Run
from sparsebert.methods.maths import scores
from sparsebert.methods.maths.schedules import Window
from sparsebert.methods.scored import (
    ScoredOnceRun,
    ScoredRun,
    check_count,
    check_decay,
    check_granularity,
)
from sparsebert.plan import Selection

VARIANTS = ("dynamic", "pre")


class SEVEN(Method):
    """Adds up |W * g| times Adam's ratio of moments, g = |G|, and keeps the largest sums, ever fewer of them.

    In the window of ``length`` steps after the first ``start``, after the j-th of them (j from 1) ::

        m <- a1 m + (1 - a1) g        m' = m / (1 - a1^j)
        v <- a2 v + (1 - a2) g^2      v' = sqrt(v / (1 - a2^j)) + 1e-9
        I <- I + |W * g * m' / v'|    W the new weight, g of the gradient that led to it; 0 where a weight is out
        keep the floor(r N) largest I,  r = f + (1 - f) (1 - j / length)^3,  f the density

    of all N selected weights, those that are out among them. What is out stays out, and outside the window the masks
    stand still.

    ``variant="pre"``: the same I summed over the first ``batches`` steps, in which nothing is trained, then the masks
    once and for all. There is no published code for it, so this is our reading.

    Options:

    - ``signed``: g = G in m, so that a gradient that flips its sign scores less; with |G|, as the published code has
      it, it scores like one that does not.
    - ``granularity``: ``"global"`` as published, one threshold for all layers with a ``BitmapConfig``, or ``"matrix"``;
      in an ``NMConfig`` layer each group keeps its largest.
    - ``start``, ``length``: the published code has them per task, 4 % to 26 % and 14 % to 52 % of ten epochs where they
      fit; by default a tenth and four tenths of the training, our choice.
    - ``alpha1``, ``alpha2``: a1 and a2; 0.8 and 0.9 are the code's.
    - ``batches``: for "pre"; by default a tenth of the training and at most 100, our choice.
    - ``every``: masks are renewed every so many steps of the window and at its last; scores every step. The published
      code renews them every step (``every=1``). With 10, our choice, up to 9 steps longer train the weights that the
      next renewal takes out.

    Further from the published code: its window stops one step before r reaches the target, and where the training is
    too short (RTE and STS-B at its defaults) far before; here the last step of the window is at the target, exactly,
    and a window that does not fit is refused. It prunes the pooler too; here the config selects the layers. Its masked
    weights drift in the file through the optimizer's momentum; here they are zeros. Ties at the threshold are all kept
    there; here the earlier ones, as many as are due.

    ``prepare``: ``ValueError`` for a schedule that does not fit, a config that is no mask, an ``NMConfig`` with columns
    and weights that do not require grad. ``finalize``: ``ValueError`` before the target is reached. Three floats a
    weight are kept: m, v and I.
    """

    def __init__(
        self,
        config: Selection,
        *,
        variant: str = "dynamic",
        signed: bool = False,
        granularity: str = "global",
        start: int | None = None,
        length: int | None = None,
        alpha1: float = 0.8,
        alpha2: float = 0.9,
        batches: int | None = None,
        every: int = 10,
    ) -> None:
        super().__init__(config)
        if variant not in VARIANTS:
            raise ValueError(f"SEVEN: variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
        foreign = {"batches": batches} if variant == "dynamic" else {"start": start, "length": length}
        for name, value in foreign.items():
            if value is not None:
                raise ValueError(f"SEVEN: {name} is {value!r}, but the variant {variant!r} has no such option")
        check_granularity("SEVEN", granularity)
        check_decay("SEVEN", "alpha1", alpha1)
        check_decay("SEVEN", "alpha2", alpha2)
        check_count("SEVEN", "batches", batches)
        self.variant = variant
        self.signed = signed
        self.granularity = granularity
        self.start = start
        self.length = length
        self.alpha1 = alpha1
        self.alpha2 = alpha2
        self.batches = batches
        self.every = every

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        self._refuse_teacher(teacher)
        return (SEVENRun if self.variant == "dynamic" else SEVENPreRun)(model, self, total_steps)


class _Moments(ScoredRun):
    """I, m and v. I is at least 0 where a weight is in, and -1 where it is out: a mask would be one more number a
    weight."""

    kinds = {kind: Kind(torch.float32) for kind in ("importance", "first", "second")}

    @property
    def masks(self) -> dict[str, Tensor]:
        return {path: self.mask(path) for path in self.configs}

    def mask(self, path: str) -> Tensor:
        return self.state["importance"][path] >= 0

    def keep(self, masks: dict[str, Tensor]) -> None:
        for path, mask in masks.items():
            self.state["importance"][path].masked_fill_(mask.logical_not(), -1.0)

    def update(self, options: SEVEN, count: int) -> None:
        """One more step of I, m and v. Where a weight is out it is 0 by now, so that nothing is added to its I."""
        for path in self.configs:
            scores.update_seven_(
                self.state["importance"][path],
                self.state["first"][path],
                self.state["second"][path],
                self.weight(path),
                self.gradient(path),
                count,
                alpha1=options.alpha1,
                alpha2=options.alpha2,
                signed=options.signed,
            )


class SEVENRun(_Moments):
    def __init__(self, model: nn.Module, options: SEVEN, total_steps: int) -> None:
        super().__init__(model, options.config, total_steps, options.granularity)
        start = total_steps // 10 if options.start is None else options.start
        length = max(1, total_steps * 2 // 5) if options.length is None else options.length
        self.options = options
        self.schedule = Window(self.budget.final, total_steps, start, length, options.every)
        for kind in self.kinds:
            self.new_state(kind)

    def after_step(self) -> None:
        self.apply_masks()
        if self.schedule.inside(self.step):
            self.update(self.options, self.step - self.schedule.start)
        if self.schedule.due(self.step):
            self.renew(self.state["importance"], self.schedule.left(self.step))


class SEVENPreRun(ScoredOnceRun, _Moments):
    def __init__(self, model: nn.Module, options: SEVEN, total_steps: int) -> None:
        batches = min(100, max(1, total_steps // 10)) if options.batches is None else options.batches
        super().__init__(model, options.config, total_steps, options.granularity, batches=batches)
        self.options = options
        for kind in self.kinds:
            self.new_state(kind)

    def gather(self, count: int) -> None:
        self.update(self.options, count)

    def scores(self) -> dict[str, Tensor]:
        return self.state["importance"]
