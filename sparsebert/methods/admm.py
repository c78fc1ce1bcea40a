"""ADMM pattern pruning: training pulls the weights towards the pattern before the pattern is imposed.

The problem is min f(W) with every W_l in a set S_l (a sparsity pattern, the int8 grid, or both), split by the
alternating direction method of multipliers (Boyd, Parikh, Chu, Peleato, Eckstein: Distributed Optimization and
Statistical Learning via ADMM, 2011), in its scaled form. Zhang et al.: A Systematic DNN Weight Pruning Framework using
ADMM (ECCV 2018) prune with it; Holmes, Zhang, He, Wu: NxMTransformer (NeurIPS 2021) do so with n:m on BERT; the pattern
of a fixed number of weights in each block, and the quantized set, follow the abstract of arXiv 2407.08334 (2024), of
which there is no public code. So every default here is our own choice.

With the outputs of each layer in place of the task's loss, the first phase is a sequence of least squares: Boza: Fast
and Effective Weight Update for Pruned Large Language Models (TMLR 2024); Meng, Behdin, Wang, Mazumder: ALPS: Improved
Optimization for Highly Sparse One-Shot Pruning for Large Language Models (NeurIPS 2024).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsebert.configs import BitmapConfig, Config, Int8Config, NMConfig
from sparsebert.formats import bitmap
from sparsebert.formats.common import wide
from sparsebert.methods.base import Kind, Method, Run
from sparsebert.methods.masked import MaskedRun, drop_
from sparsebert.methods.maths.layerwise import OutputError, check_moment
from sparsebert.methods.maths.projections import Block, Dictionary, Int8Grid, Largest, Pattern, Scaled, on_grid
from sparsebert.methods.maths.scores import update_mean_
from sparsebert.methods.straight_through import hide_, reveal_
from sparsebert.plan import CompressionPlan, Selection

FINISHES = ("frozen", "sr-ste")
# Rounds of the first phase, where it has as many steps, and what rho grows by: some 15-fold in all, in both forms.
ROUNDS, GROWTH = 10, 1.3
LAYER_ROUNDS, LAYER_GROWTH = 30, 1.1
# A layer that obeys its pattern already would get an infinite rho: it counts as this part of |W| away.
_LEAST_GAP = 1e-3


class Residuals(NamedTuple):
    """Of one layer at its last round (before the first: at the start).

    ``primal``: |W - Z| / |W|. ``dual_residual``: rho |Z - Z of the round before|. ``out_of_pattern``: what a projection
    would take away then, |W - P_S(W)|² / |W|².
    """

    primal: float
    dual_residual: float
    out_of_pattern: float


_FIRST_PHASE = frozenset({"anchor", "dual", "gap", "gradient", "rho", *Residuals._fields})


class ADMM(Method):
    """First phase: the fraction ``admm`` of the steps, in ``rounds`` of equal length. Z = P_S(W) and U = 0 at the
    start; every optimizer step is one on f(W) + sum_l rho_l / 2 |W_l - Z_l + U_l|², and a round ends with::

        Z <- P_S(W + U)    U <- U + W - Z    rho <- min(rho_growth rho, rho_max rho_1)    U <- U rho_before / rho

    where the last rescaling keeps the unscaled dual rho U, as Boyd et al. (3.4.1) have it. The gradient of the penalty,
    rho (W - Z + U), is added to the accumulated, clipped gradient, so a loop needs no loss term, and f's clipping does
    not see it. The model computes with the dense W throughout this phase.

    Second phase, the rest of the steps: W <- P_S(W), and the optimizer starts anew for these weights (its moments are
    those of the other problem). Then, by ``finish``:

    - ``frozen``: the mask holds; G <- M * G, W <- M * W, as ``Magnitude`` has it;
    - ``sr-ste`` (Zhou et al.: Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, ICLR 2021): a
      dense W stays behind the mask, the model computes with M * W, G = dL/d(M * W) + ``sr_ste_decay`` (1 - M) * W, the
      second term after clipping. M is that of P_S(W), renewed every ``every`` steps (published: in every forward; a
      mask is then up to ``every`` - 1 steps old); it freezes for the last ``freeze`` of all steps.

    An int8 layer keeps its full-precision W behind the grid in both: the model computes with the rounded weight, the
    optimizer moves the dense one with the rounded one's gradient, and what is exported is to the bit what was trained.

    ``config``, layer by layer: ``NMConfig``, ``BitmapConfig``, ``Int8Config`` with or without an n:m pattern.
    ``projection``: a ``Block`` or ``Dictionary`` (fitted here to all layers' weights unless it has patterns) for every
    layer; None: the n largest of each group, or the largest of the whole matrix. A ``BitmapConfig`` has to have the
    projection's density, an ``NMConfig(n, m)`` takes tiles of 1 x m with n weights, and ``columns`` take none.

    ``rho``: the first rho of a layer is such that its penalty's gradient has ``rho`` times the norm of the layer's
    gradient: rho_1 = ``rho`` mean|G| / |W_0 - Z_0|, the mean over the steps of the first round so far. 0 is plain
    training. ``decoupled``: W <- W - lr rho (W - Z + U) after the optimizer's step instead, outside of what Adam
    normalizes; |G| is then |step of the optimizer| / lr. ``rounds`` and ``rho_growth`` None: 10 rounds, or one a step
    where there are fewer, and 1.3; 30 and 1.1 with ``input_moments``.

    ``input_moments``: path -> ``(in, in)``, C = E[x x^T] for every layer, as ``methods.input_moments`` measures it. The
    first phase is then solved in ``prepare``, layer by layer, and all training steps belong to the second. It asks for
    the outputs that the layer has, a distillation of each: f(W) = E|(W - W_0) x|² / 2, whose W-step is exact::

        W <- (W_0 C + rho (Z - U) D²) (C + rho D²)^-1    D = diag(C)^(1/2)

    and the last Z is where W starts. The penalty is rho / 2 |(W - Z + U) D|² and P_S the projection in that norm, the n
    largest |v_ij| d_j (our own choice, as is ``rho``, here as it stands, growing up to ``rho_max`` of it; the int8 grid
    is projected on in the plain norm, once the pattern is chosen). A resumed run needs moments too, whose result its
    state replaces. ``admm`` and ``decoupled`` have no meaning then.

    Published code differs: it penalizes the unsquared norm and starts with Z = W (pytorch-admm-pruning), where the
    first round only holds weights in place; here the norm is squared and Z projected.

    Memory: two numbers a weight in the first phase (three in the first round where ``decoupled``); then a byte, and one
    number where a dense weight is kept. The run lets go of ``input_moments`` once ``prepare`` is done.

    ``ValueError`` for options out of range; in ``prepare`` for a config without a projection, a projection that does
    not fit, moments that do not, more rounds than steps, and a teacher: distillation is the loop's.
    """

    def __init__(
        self,
        config: Selection,
        *,
        projection: Block | Dictionary | None = None,
        rounds: int | None = None,
        admm: float | None = None,
        rho: float = 0.1,
        rho_growth: float | None = None,
        rho_max: float = 100.0,
        finish: str = "frozen",
        sr_ste_decay: float = 2e-4,
        every: int = 5,
        freeze: float = 0.1,
        decoupled: bool = False,
        input_moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(config)
        if projection is not None and not isinstance(projection, Block | Dictionary):
            raise TypeError(f"ADMM: projection is {type(projection).__name__}, expected Block, Dictionary or None")
        layerwise = input_moments is not None
        if layerwise and (admm is not None or decoupled):
            raise ValueError("ADMM: with input_moments the first phase takes no steps: expected no admm, no decoupled")
        if layerwise and isinstance(projection, Dictionary):
            raise ValueError("ADMM: input_moments and a Dictionary do not go together; its patterns are fitted to |w|")
        admm = 0.6 if admm is None else admm
        rho_growth = (LAYER_GROWTH if layerwise else GROWTH) if rho_growth is None else rho_growth
        for name, count in (("rounds", rounds), ("every", every)):
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
                raise ValueError(f"ADMM: {name} is {count!r}, expected a positive int")
        for name, number, least in (
            ("rho", rho, 0.0),
            ("rho_growth", rho_growth, 1.0),
            ("rho_max", rho_max, 1.0),
            ("sr_ste_decay", sr_ste_decay, 0.0),
        ):
            if not (math.isfinite(number) and number >= least):
                raise ValueError(f"ADMM: {name} is {number}, expected at least {least:g}")
        if finish not in FINISHES:
            raise ValueError(f"ADMM: finish is {finish!r}, expected one of {', '.join(FINISHES)}")
        if not 0 < admm <= 1:
            raise ValueError(f"ADMM: admm is {admm}, expected a fraction of the steps above 0")
        if layerwise:
            admm = 0.0
            if not rho:
                raise ValueError(
                    "ADMM: rho is 0, expected more with input_moments: nothing would hold W to the pattern"
                )
        if not 0 <= freeze < 1 or (finish == "sr-ste" and admm + freeze > 1):
            raise ValueError(f"ADMM: admm is {admm} and freeze {freeze} of the steps, expected at most 1 together")
        self.projection = projection
        self.rounds = rounds
        self.admm = admm
        self.rho = rho
        self.rho_growth = rho_growth
        self.rho_max = rho_max
        self.finish = finish
        self.sr_ste_decay = sr_ste_decay
        self.every = every
        self.freeze = freeze
        self.decoupled = decoupled
        self.input_moments = input_moments

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        self._refuse_teacher(teacher)
        return ADMMRun(model, self, total_steps)


class ADMMRun(MaskedRun):
    """``masks`` are there from the second phase on, ``residuals`` in both. ``projections``: path -> P_S."""

    # anchor is Z - U, which is all that a step needs; hidden is what a dense weight has beyond the model's.
    kinds = {
        **{name: Kind() for name in ("anchor", "dual", "hidden")},
        **{name: Kind(torch.float32, scalar=True) for name in ("gap", "gradient", "rho", *Residuals._fields)},
        "mask": Kind(torch.bool),
    }

    @torch.no_grad()
    def __init__(self, model: nn.Module, method: ADMM, total_steps: int) -> None:
        super().__init__(model, method.config, total_steps)
        self.options = method
        tiles = method.projection
        weights = {path: self.finite_weight(path) for path in self.configs}
        self.patterns = {path: _pattern(path, config, tiles, weights[path]) for path, config in self.configs.items()}
        if isinstance(tiles, Dictionary) and tiles.patterns is None:
            self._take_dictionary(tiles.fit(weights.values()))
        self._rhos: dict[str, float] = {}
        self._rates: dict[str, float] = {}
        self._old_weights: dict[str, Tensor] = {}
        self.admm_steps, self.round_ends = _rounds(method, total_steps)
        self.frozen_from = self.admm_steps
        if method.finish == "sr-ste":
            self.frozen_from = max(self.admm_steps, total_steps - round(method.freeze * total_steps))
        moments = method.input_moments
        if moments is not None:
            for path, weight in weights.items():
                if path not in moments:
                    raise ValueError(f"ADMM: {path}: has no input_moments; measure them for the same layers")
                check_moment(weight, moments[path], name=f"ADMM: {path}")
        for kind in sorted(_FIRST_PHASE):
            self.new_state(kind)
        for path, weight in weights.items():
            layer = None if moments is None else OutputError(weight, moments[path])
            if layer is not None and (pattern := self.patterns[path]) is not None:
                self.patterns[path] = Scaled(pattern, layer.scale)
            self.state["anchor"][path].copy_(self._project(path, weight))
            gap, norm = _norm(weight - self.state["anchor"][path]), _norm(weight)
            self.state["gap"][path].copy_(torch.maximum(gap, _LEAST_GAP * norm))
            self.state["primal"][path].copy_(_ratio(gap, norm))
            self.state["out_of_pattern"][path].copy_(_ratio(gap, norm).square())
            if layer is not None:
                self._solve(path, layer)
        if moments is not None:
            self._impose()
            # In² numbers a layer, which nothing needs any more.
            self.options = copy.copy(method)
            self.options.input_moments = None

    @property
    def round(self) -> int:
        """Rounds that are done."""
        return sum(end <= self.step for end in self.round_ends)

    @property
    def residuals(self) -> dict[str, Residuals]:
        return {path: Residuals(*(float(self.state[k][path]) for k in Residuals._fields)) for path in self.configs}

    def metrics(self) -> dict[str, float]:
        """``sparsity``; means over the layers of the ``Residuals`` and ``rho``; and ``round``, how many are done."""
        means = {kind: self.state[kind].values() for kind in (*Residuals._fields, "rho")}
        return {
            **super().metrics(),
            **{kind: sum(map(float, held)) / len(held) for kind, held in means.items()},
            "round": float(self.round),
        }

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.step < self.admm_steps:
            self._pull(optimizer)
            return
        for path, mask in self.masks.items():
            weight = self.weight(path)
            if self.step == self.admm_steps:
                # With its count of steps: Adam corrects the moments by it.
                optimizer.state.pop(weight, None)
            if self._dense_behind(path, self.step):
                reveal_(weight, self.state["hidden"][path])
            if weight.grad is None:
                continue
            if self.step >= self.frozen_from:
                weight.grad.mul_(mask)
            else:
                outside = weight * mask.logical_not() if self._on_grid(path) else self.state["hidden"][path]
                weight.grad.add_(outside, alpha=self.options.sr_ste_decay)

    def after_step(self) -> None:
        if self.step > self.admm_steps:
            self._hide()
            return
        self._pull_decoupled()
        if self.step in self.round_ends:
            for path in self.configs:
                self._end_round(path)
        if self.step == self.admm_steps:
            self._impose()

    def resumed(self) -> None:
        self._rhos.clear()
        if "mask" in self.state:
            self.apply_masks()

    @torch.no_grad()
    def finalize(self) -> CompressionPlan:
        if "mask" not in self.state:
            self._impose()
        return super().finalize()

    def state_dict(self) -> dict[str, Any]:
        dictionary = self._dictionary()
        return {**super().state_dict(), **({} if dictionary is None else {"patterns": dictionary.patterns})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        dictionary = self._dictionary()
        if (dictionary is None) != ("patterns" not in state):
            has, expected = ("a", "none") if dictionary is None else ("no", "one")
            raise ValueError(f"ADMM: the state has {has} dictionary of patterns, expected {expected}")
        if dictionary is not None:
            dictionary = replace(dictionary, patterns=state["patterns"])
        held, step = self.state, state.get("step")
        # Each phase has its own tensors: those of the state's are expected.
        self.state = {kind: {} for kind in self._kinds_at(step if isinstance(step, int) else self.step)}
        try:
            super().load_state_dict(state)
        except BaseException:
            self.state = held
            raise
        if dictionary is not None:
            self._take_dictionary(dictionary)

    def _kinds_at(self, step: int) -> set[str]:
        if step < self.admm_steps:
            return set(_FIRST_PHASE)
        dense = any(self._dense_behind(path, step) for path in self.configs)
        return {"mask", "rho", *Residuals._fields} | ({"hidden"} if dense else set())

    def _dense_behind(self, path: str, step: int) -> bool:
        """Whether after ``step`` steps, all of the first phase among them, the model computes with a part of a dense
        weight."""
        return step < self.frozen_from or self._on_grid(path)

    def _on_grid(self, path: str) -> bool:
        return isinstance(self.configs[path], Int8Config)

    def _project(self, path: str, values: Tensor) -> Tensor:
        pattern = self.patterns[path]
        if self._on_grid(path):
            return Int8Grid(pattern)(values)
        return pattern(values)  # type: ignore[misc]

    def _dictionary(self) -> Dictionary | None:
        return next((found for found in self.patterns.values() if isinstance(found, Dictionary)), None)

    def _take_dictionary(self, dictionary: Dictionary) -> None:
        self.patterns = dict.fromkeys(self.patterns, dictionary)

    def _solve(self, path: str, layer: OutputError) -> None:
        """All rounds of one layer; its weight is the last Z then."""
        weight, anchor, dual = self.weight(path), self.state["anchor"][path], self.state["dual"][path]
        self.state["rho"][path].fill_(self.options.rho)
        for _ in self.round_ends:
            weight.copy_(layer.minimum(anchor, self._rho(path)))
            self._end_round(path)
        torch.add(anchor, dual, out=weight)

    def _pull(self, optimizer: torch.optim.Optimizer) -> None:
        """The penalty's gradient, or what a decoupled one needs to know of the coming step."""
        first = self.step < self.round_ends[0]
        rates = {}
        if self.options.decoupled:
            rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        for path, anchor in self.state["anchor"].items():
            weight = self.weight(path)
            if weight.grad is None:
                continue
            if self.options.decoupled:
                self._rates[path] = rates[id(weight)]
                if first:
                    self._old_weights[path] = weight.detach().clone()
                continue
            if first:
                self._set_first_rho(path, _norm(weight.grad), self.step + 1)
            if not (rho := self._rho(path)):
                continue
            weight.grad.add_(weight, alpha=rho).sub_(anchor, alpha=rho)

    def _pull_decoupled(self) -> None:
        for path, rate in self._rates.items():
            weight = self.weight(path)
            if (old := self._old_weights.pop(path, None)) is not None and rate:
                self._set_first_rho(path, _norm(old.sub_(weight)) / rate, self.step)
            weight.lerp_(self.state["anchor"][path], min(1.0, rate * self._rho(path)))
        self._rates.clear()

    def _set_first_rho(self, path: str, norm: Tensor, count: int) -> None:
        mean = self.state["gradient"][path]
        update_mean_(mean, norm, count)
        self.state["rho"][path].copy_(self._first_rho(path))
        self._rhos.pop(path, None)

    def _rho(self, path: str) -> float:
        # Asking a GPU for a number waits for it: once a round and not once a step.
        if path not in self._rhos:
            self._rhos[path] = float(self.state["rho"][path])
        return self._rhos[path]

    def _first_rho(self, path: str) -> Tensor:
        if not self.admm_steps:
            return torch.full_like(self.state["rho"][path], self.options.rho)
        return _ratio(self.options.rho * self.state["gradient"][path], self.state["gap"][path])

    def _end_round(self, path: str) -> None:
        weight = self.weight(path).detach()
        anchor, dual, rho = (self.state[kind][path] for kind in ("anchor", "dual", "rho"))
        old = anchor.add_(dual)
        target = weight + dual
        new = self._project(path, target)
        norm = _norm(weight)
        self.state["primal"][path].copy_(_ratio(_norm(weight - new), norm))
        self.state["dual_residual"][path].copy_(rho * _norm(old.sub_(new)))
        self.state["out_of_pattern"][path].copy_(_ratio(_norm(weight - self._project(path, weight)), norm).square())
        torch.sub(target, new, out=dual)
        grown = torch.minimum(rho * self.options.rho_growth, self.options.rho_max * self._first_rho(path))
        dual.mul_(torch.where(grown > 0, rho / grown, torch.ones_like(grown)))
        rho.copy_(grown)
        self._rhos.pop(path, None)
        torch.sub(new, dual, out=anchor)

    def _impose(self) -> None:
        """W <- P_S(W), and what the second phase keeps in place of the first one's."""
        self.new_state("mask")
        if "hidden" in self._kinds_at(self.admm_steps):
            self.new_state("hidden")
        for path, mask in self.masks.items():
            weight, pattern = self.weight(path), self.patterns[path]
            mask.copy_(pattern.mask(weight)) if pattern is not None else mask.fill_(True)
            if self.admm_steps < self.frozen_from:
                hide_(weight, mask, self.state["hidden"][path])
            drop_(weight, mask)
            if self._on_grid(path):
                weight.copy_(Int8Grid()(weight))
        for kind in _FIRST_PHASE - self._kinds_at(self.admm_steps):
            del self.state[kind]

    def _hide(self) -> None:
        """After a step of the second phase: the dense weight, where there is one, goes behind what the model computes
        with."""
        free = self.step <= self.frozen_from
        due = (self.step - self.admm_steps) % self.options.every == 0 or self.step == self.frozen_from
        for path, mask in self.masks.items():
            weight, pattern = self.weight(path), self.patterns[path]
            if free and due and pattern is not None:
                mask.copy_(pattern.mask(weight))
            if not self._dense_behind(path, self.step):
                drop_(weight, mask)
                continue
            hidden = self.state["hidden"][path]
            if not self._on_grid(path):
                hide_(weight, mask, hidden)
                continue
            if self.step >= self.frozen_from:
                drop_(weight, mask)
            hidden.copy_(weight)
            drop_(weight, mask)
            weight.copy_(on_grid(weight))
            hidden.sub_(weight)
        if "hidden" in self.state and "hidden" not in self._kinds_at(self.step):
            del self.state["hidden"]


def _rounds(method: ADMM, total_steps: int) -> tuple[int, list[int]]:
    """Steps of the first phase, and the step that each of its rounds ends with."""
    if method.input_moments is not None:
        return 0, [0] * (LAYER_ROUNDS if method.rounds is None else method.rounds)
    steps = max(1, round(method.admm * total_steps))
    rounds = min(ROUNDS, steps) if method.rounds is None else method.rounds
    if rounds > steps:
        raise ValueError(
            f"ADMM: {rounds} rounds do not fit the {steps} steps of the first phase ({method.admm:g} of {total_steps})"
        )
    # As equal as whole steps allow, the last one ending with the phase.
    return steps, [-(-i * steps // rounds) for i in range(1, rounds + 1)]


def _pattern(path: str, config: Config, tiles: Block | Dictionary | None, weight: Tensor) -> Pattern | None:
    """Where ``config`` lets weights lie, by ``tiles`` where they are given; ``ValueError`` where they do not fit."""
    if not isinstance(config, NMConfig | BitmapConfig | Int8Config):
        raise ValueError(
            f"ADMM: {path}: there is no projection for {config}; expected an NMConfig, BitmapConfig or Int8Config"
        )
    sparse = config.weights if isinstance(config, Int8Config) else config
    if tiles is None:
        return None if sparse is None else Largest(sparse)
    out_features, in_features = weight.shape
    name = f"{type(tiles).__name__}({tiles.p}, {tiles.q}, {tiles.k})"
    if reason := tiles.refusal(out_features, in_features):
        raise ValueError(f"ADMM: {path}: {reason}")
    if isinstance(sparse, BitmapConfig):
        kept = round(tiles.density * weight.numel())
        if bitmap.keep_count(sparse.density, out_features, in_features) != kept:
            raise ValueError(f"ADMM: {path}: {name} keeps the density {tiles.density:g}, but the config is {sparse}")
    elif sparse is None or sparse.columns is not None or (tiles.p, tiles.q, tiles.k) != (1, sparse.m, sparse.n):
        raise ValueError(f"ADMM: {path}: {name} does not make {config}")
    return tiles


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=wide(values.dtype)).float()


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where whole is."""
    return torch.where(whole > 0, part / whole, torch.zeros_like(whole))
