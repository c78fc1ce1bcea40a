"""LPAF: prune, factorize what is left, and train the factors beside it.

Ren, Zhu: Low-Rank Prune-And-Factorize for Language Model Compression (LREC-COLING 2024). Its observation is that what
first-order pruning leaves of a fine-tuned matrix is nearly of low rank, while the matrix before was not. Three stages:

1. prune by movement: ``Movement``, a run of its own;
2. factorize each sparse matrix W_s, rows that kept more counting more;
3. fine-tune the factors, at first with W_s in their place now and then.

The authors' code is not public. Stages 2 and 3 are our reading of the paper's idea: the exact row weight, the schedule
of stage 3, the loss that ties two passes and the numbers below are our choices, and options where there are several.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsebert.configs import LowRankConfig
from sparsebert.formats import one_shot
from sparsebert.methods.base import Kind, Method, Run
from sparsebert.methods.factored import FactoredLinear, FactoredRun, factor_
from sparsebert.methods.maths.distillation import kl_divergence, symmetric_kl
from sparsebert.methods.maths.factors import importance_of_kept, weighted_svd
from sparsebert.methods.maths.schedules import Linear
from sparsebert.methods.teacher import Teacher, check_teacher
from sparsebert.plan import CompressionPlan, Selection
from sparsebert.roles import find_layers

WEIGHTINGS = ("none", "row-share", "rows", "rows-columns", "fisher")
GATES = ("matrix", "layer", "model")


class LPAF(Method):
    """Low-rank factors of a sparse model, trained with mixed rank. ``config``: a ``LowRankConfig``, or a mapping.

    ``prepare`` takes a model that ``Movement``, or anything else, left sparse, and makes of every selected weight W_s
    the factors u ``(out, rank)`` and v ``(rank, in)`` that minimize ``|Dr (W_s - u v) Dc|``. Rows of W_s that are empty
    are exactly zero in u, and empty columns in v. Biases and all else stay as they are. ``weighting``, with k the
    number of weights kept in a row or column:

    - ``none``: Dr = Dc = 1, the plain SVD;
    - ``row-share``: Dr = k / sum k;
    - ``rows`` (the default, since it is what FWSVD does with k in place of the Fisher information): Dr = sqrt k;
    - ``rows-columns``: Dr = sqrt k of rows, Dc = sqrt k of columns;
    - ``fisher``: Dr = ``fisher[path] (out)``, which ``fisher_row_weights`` measures (FWSVD: Hsu et al.: Language model
      compression with weighted low-rank factorization, ICLR 2022).

    Training is mixed-rank: at each forward pass of the model each gate draws z, 1 with probability p, and its layers
    compute::

        y = z (W_s x) + (1 - z) u (v x) + b        p(t) = p0 max(0, 1 - t / (mixed * total_steps))

    with t the steps done. In eval mode z is 0. What a pass does not use gets a gradient of zeros, not none, so that the
    optimizer treats it as the formula says and DistributedDataParallel finds every parameter in every pass. Draws come
    from ``seed``, the step and the number of the pass in it, so they are equal on every rank and after a resume.

    - ``p0``, ``mixed``: 0.6 and 0.6. With p0 = 0 this is plain fine-tuning of the factors.
    - ``gate``: what draws together: each ``matrix`` (the default), all of an encoder ``layer``, or the whole ``model``.
    - ``consistency``: lambda, 1. While p is above 0, ``run.loss`` calls the model once more, with other draws and other
      dropout, and ties the two passes as R-Drop does (Liang et al., NeurIPS 2021)::

          L = 1/2 [CE1 + CE2] + lambda/2 [KL(p1 || p2) + KL(p2 || p1)] = outputs.loss + run.loss(outputs, inputs)

      That doubles the cost of these steps. Once p is 0, or with ``consistency=0``, there is no second pass. It needs
      ``outputs.logits``, and ``inputs["labels"]`` unless there is a teacher: without labels the CE terms are left out.
    - ``train_sparse``: whether W_s is trained too, at its non-zeros. False; it is held as it was.
    - ``distillation``: with a ``teacher`` in ``prepare``, run.loss also adds ``distillation *`` the
      ``kl_divergence`` of the first pass from it, at ``temperature`` (1 and 2). It is asked in evaluation mode, and
      moved to the student's device when the run is attached.

    ``ValueError`` in ``prepare``: a config of another kind; a selected weight that holds NaN, is all zeros, or, with a
    weighting by what was kept, has no zero; a missing or unfit ``fisher``; ``gate="layer"`` for a model without roles;
    a teacher that is the model. In ``run.loss``: logits of one class (a regression), or a second pass without a task.
    """

    def __init__(
        self,
        config: Selection,
        *,
        weighting: str = "rows",
        p0: float = 0.6,
        mixed: float = 0.6,
        consistency: float = 1.0,
        gate: str = "matrix",
        train_sparse: bool = False,
        fisher: Mapping[str, Tensor] | None = None,
        distillation: float = 1.0,
        temperature: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__(config)
        for name, value, known in (("weighting", weighting, WEIGHTINGS), ("gate", gate, GATES)):
            if value not in known:
                raise ValueError(f"LPAF: {name} is {value!r}, expected {', '.join(known)}")
        if not 0 <= p0 <= 1:
            raise ValueError(f"LPAF: p0 is {p0}, expected 0 to 1")
        if not 0 < mixed <= 1:
            raise ValueError(f"LPAF: mixed is {mixed}, expected above 0 and at most 1 (1: all of the training)")
        for name, number in (("consistency", consistency), ("distillation", distillation)):
            if not (math.isfinite(number) and number >= 0):
                raise ValueError(f"LPAF: {name} is {number}, expected 0 or more")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"LPAF: temperature is {temperature}, expected above 0")
        if (fisher is not None) != (weighting == "fisher"):
            raise ValueError("LPAF: weighting='fisher' and fisher= go together; fisher_row_weights measures it")
        self.weighting = weighting
        self.p0 = p0
        self.mixed = mixed
        self.consistency = consistency
        self.gate = gate
        self.train_sparse = train_sparse
        self.fisher = fisher
        self.distillation = distillation
        self.temperature = temperature
        self.seed = seed

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        return LPAFRun(model, self, total_steps, teacher)


class LPAFRun(FactoredRun):
    # W_s while it is held and not trained: a checkpoint of the model has the factors alone, so it is the run's.
    kinds = {"sparse": Kind()}

    def __init__(self, model: nn.Module, method: LPAF, total_steps: int, teacher: nn.Module | None) -> None:
        super().__init__(model, method.config, total_steps)
        if teacher is not None:
            check_teacher(self.method, model, teacher)
        for path, config in self.configs.items():
            if not isinstance(config, LowRankConfig):
                raise ValueError(f"{self.method}: {path}: {config} is not low rank; expected a LowRankConfig")
        self.options = method
        self.probability = Linear(method.p0, max(1, round(method.mixed * total_steps)))
        self.teacher = Teacher(teacher) if teacher is not None and method.distillation else None
        self._gates = _gates(model, list(self.configs), method.gate)
        self._passes = 0
        # All factors before the first edit, so that a bad weight leaves the model as it was.
        factors = {path: self._factorize(path, method) for path in self.configs}
        self._mixed: dict[str, MixedRankLinear] = {}
        for path, (u, v) in factors.items():
            sparse = self.weight(path).detach() if method.p0 > 0 else None
            linear = model.get_submodule(path)
            self._mixed[path] = mix_(linear, u, v, sparse, trained=method.train_sparse)  # type: ignore[arg-type]
        self._share_sparse()
        self._hook = model.register_forward_pre_hook(self._draw)
        self._next_step()

    def trained(self, path: str) -> list[nn.Parameter]:
        pruned = self._mixed[path].pruned
        return [*super().trained(path), *([] if pruned is None else [pruned])]

    def added_loss(self, outputs: Any, inputs: Any) -> Tensor:
        total = super().added_loss(outputs, inputs)
        if not self.model.training:
            return total
        if not isinstance(inputs, Mapping):
            raise TypeError(f"{self.method}: inputs is {type(inputs).__name__}, expected the mapping of the forward")
        if not self.needs_loss:
            return total
        logits = _logits(outputs)
        if logits[0].shape[-1] < 2:
            raise ValueError(
                f"{self.method}: logits have one class, over which every divergence is 0; use consistency=0 and no "
                f"teacher"
            )
        if self.teacher is not None:
            _, answer = self.teacher.ask(inputs)
            for ours, theirs in zip(logits, _logits(answer), strict=True):
                total = total + self.options.distillation * kl_divergence(
                    ours.flatten(0, -2), theirs.flatten(0, -2), self.options.temperature
                )
        if self._two_passes():
            total = total + self._second_pass(outputs, logits, inputs)
        return total

    def after_step(self) -> None:
        self._next_step()

    def resumed(self) -> None:
        for path, mixed in self._mixed.items():
            if mixed.held is not None:
                mixed.held = self.state["sparse"][path]
        self._next_step()

    def metrics(self) -> dict[str, float]:
        """``mixed``: the probability p of a gate at the next step."""
        return {**super().metrics(), "mixed": self.probability.at(self.step)}

    def finalize(self) -> CompressionPlan:
        self._hook.remove()
        for mixed in self._mixed.values():
            mixed.strip()
        plan = super().finalize()
        self._mixed, self.state = {}, {}
        return plan

    @torch.no_grad()
    def _factorize(self, path: str, method: LPAF) -> tuple[Tensor, Tensor]:
        weight, config = self.finite_weight(path), self.configs[path]
        empty_rows, empty_columns = ((weight == 0).all(dim) for dim in (1, 0))
        if empty_rows.all():
            raise ValueError(f"{self.method}: {path}: weight is all zeros")
        if method.weighting == "fisher":
            if path not in (method.fisher or {}):
                raise ValueError(f"{self.method}: {path}: fisher has no rows for this layer")
            rows, columns = method.fisher[path], None  # type: ignore[index]
        else:
            if method.weighting != "none" and weight.all():
                raise ValueError(
                    f"{self.method}: {path}: weight has no zeros, so weighting={method.weighting!r} says nothing; "
                    f"prune it first, with Movement, or choose weighting='none'"
                )
            rows, columns = importance_of_kept(weight, method.weighting)
        rank = one_shot.rank_of(config, *weight.shape)  # type: ignore[arg-type]
        u, v = weighted_svd(weight, rank, rows=rows, columns=columns, name=f"{self.method}: {path}")
        # Exactly: what is left there is rounding, divided by the smallest weights there are.
        return u.masked_fill(empty_rows.unsqueeze(1), 0.0), v.masked_fill(empty_columns, 0.0)

    def _share_sparse(self) -> None:
        held = {path: mixed.held for path, mixed in self._mixed.items() if mixed.held is not None}
        if held:
            self.state["sparse"] = held

    def _follow(self) -> None:
        # They move with the model.
        self._share_sparse()
        if self.teacher is not None:
            self.teacher.to(next(self.model.parameters()).device)

    def _draw(self, module: nn.Module, args: Any) -> None:
        if not module.training:
            return
        probability = self.probability.at(self.step)
        # Seeded by text: torch's CPU generator takes 32 bits of a seed, too few for three numbers side by side.
        generator = random.Random(f"{self.options.seed} {self.step} {self._passes}")
        self._passes += 1
        for paths in self._gates:
            z = generator.random() < probability
            for path in paths:
                self._mixed[path].open = z

    def _two_passes(self) -> bool:
        return self.options.consistency > 0 and self.probability.at(self.step) > 0

    def _next_step(self) -> None:
        self._passes = 0
        self.needs_loss = self._two_passes() or self.teacher is not None

    def _second_pass(self, outputs: Any, logits: list[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise RuntimeError(
                f"{self.method}: gradient checkpointing would recompute the first pass with the draws of the second; "
                f"turn it off, or use consistency=0"
            )
        again = self.model(**inputs)
        ties = [symmetric_kl(a, b) for a, b in zip(logits, _logits(again), strict=True)]
        total = self.options.consistency / 2 * torch.stack(ties).sum()
        first, second = _loss(outputs), _loss(again)
        if first is not None and second is not None:
            return total + (second - first) / 2
        if self.teacher is None:
            raise ValueError(
                f"{self.method}: the model gives no loss for these inputs, so the second pass has no task; "
                f"pass labels, a teacher, or consistency=0"
            )
        return total


class MixedRankLinear(FactoredLinear):
    """A ``FactoredLinear`` that computes with the sparse weight W_s while its gate is ``open`` and it trains.

    W_s is the parameter ``pruned`` where it is trained, and else ``held``, neither parameter nor buffer: a checkpoint
    of the model leaves it out, and DistributedDataParallel does not send it at every step. Both None: there is nothing
    to mix with. ``weight`` is u v, whatever the gate. Made by ``mix_``.
    """

    pruned: nn.Parameter | None
    held: Tensor | None
    open: bool

    def forward(self, input: Tensor) -> Tensor:
        # Of what is trained, the zeros get no gradient, so they stay zeros.
        chosen = self.held if self.pruned is None else self.pruned * (self.pruned.detach() != 0)
        if self.open and self.training and chosen is not None:
            return F.linear(input, _Chosen.apply(chosen, self.u, self.v), self.bias)
        output = super().forward(input)
        return output if self.pruned is None else _Chosen.apply(output, self.pruned)

    def strip(self) -> None:
        """Takes off what a ``FactoredLinear`` has not."""
        del self.pruned, self.held, self.open

    def _apply(self, fn: Any, recurse: bool = True) -> MixedRankLinear:
        super()._apply(fn, recurse)
        if self.held is not None:
            self.held = fn(self.held)
        return self


def mix_(linear: nn.Linear, u: Tensor, v: Tensor, sparse: Tensor | None, *, trained: bool) -> MixedRankLinear:
    """Makes ``linear`` a ``MixedRankLinear`` in place, its gate shut; ``trained``: whether W_s is."""
    trains = linear.weight.requires_grad
    mixed: Any = factor_(linear, {"u": u, "v": v}, MixedRankLinear)
    pruned = nn.Parameter(sparse.clone(), requires_grad=trains) if trained and sparse is not None else None
    mixed.register_parameter("pruned", pruned)
    mixed.held = None if trained else sparse
    mixed.open = False
    return mixed


class _Chosen(torch.autograd.Function):
    """The first tensor; the others get gradients of zeros, without being computed with."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(t.shape, t.dtype, t.device) for t in others]
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        zeros = [
            torch.zeros(shape, dtype=dtype, device=device) if needed else None
            for needed, (shape, dtype, device) in zip(ctx.needs_input_grad[1:], ctx.others, strict=True)
        ]
        return gradient if ctx.needs_input_grad[0] else None, *zeros


def _gates(model: nn.Module, paths: list[str], gate: str) -> list[list[str]]:
    if gate == "model":
        return [paths]
    if gate == "matrix":
        return [[path] for path in paths]
    layers = {layer.path: layer.index for layer in find_layers(model)}
    found: dict[Any, list[str]] = {}
    for path in paths:
        # A layer outside of the encoder has a gate of its own.
        found.setdefault(layers.get(path, path), []).append(path)
    return list(found.values())


def _logits(outputs: Any) -> list[Tensor]:
    """The logits of a model's outputs; of a question answering model those of both ends."""
    names = ("logits", "start_logits", "end_logits")
    found = [t for name in names if isinstance(t := getattr(outputs, name, None), Tensor)]
    if not found:
        raise ValueError(f"LPAF: the outputs are {type(outputs).__name__} without logits")
    return found


def _loss(outputs: Any) -> Tensor | None:
    return getattr(outputs, "loss", None)
