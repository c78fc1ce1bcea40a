"""LoSparse: W = u v + S, a low-rank part that stays and a sparse part that training prunes row by row.

Li, Yu, Zhang, Liang, He, Chen, Zhao: LoSparse: Structured Compression of Large Language Models based on Low-Rank and
Sparse Approximation (ICML 2023). Its distillation is a run of its own after this one: ``FactorTuning``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsebert.configs import BitmapConfig, Config, LowRankSparseConfig, NMConfig, RowsConfig, SparseConfig
from sparsebert.formats import bitmap, low_rank, one_shot, rows
from sparsebert.formats.common import largest_in_groups, wide
from sparsebert.methods.base import Kind, Method, Run
from sparsebert.methods.factored import FactoredRun
from sparsebert.methods.masked import kept_fraction
from sparsebert.methods.maths import schedules, scores, thresholds
from sparsebert.methods.scored import check_count, check_decay, check_granularity
from sparsebert.plan import CompressionPlan, Selection

INITS = ("svd", "random", "random-residual")
# E |u v|^2 / |W|^2 (Frobenius) of random factors.
RANDOM_ENERGY = 0.01


class LoSparse(Method):
    """Splits each weight as W = u v + S, u v its truncated SVD and S all the rest, so that the model computes what it
    did; trains u, v and S; and prunes S on the way, by rows (``RowsConfig``), n:m or entry by entry (``BitmapConfig``).
    ``init`` has other ways to begin.

    After every optimizer step, with the new S and its gradient G = dL/dS = dL/dW, PLATON's scores are renewed: I, the
    mean of |S * G| over a window of steps, goes into Ī <- beta1 Ī + (1 - beta1) I as the next window begins. A row's
    score is the mean of Ī over it. Once a window, and after every one of the last ``end`` steps, the rows with the
    smallest scores become zeros, as many as the schedule asks for (``schedules.Cubic``, from all of S to the config's
    ratio). No mask is held: rows of zeros still get gradients, are moved by the optimizer, and come back where their
    score says so.

    ``config``: ``LowRankSparseConfig`` alone, or in a mapping. The code of the paper rounds the rank that a ratio means
    up, ours down (``LowRankConfig``); give ``rank`` for its numbers.

    - ``beta1`` 0.85, ``beta2`` 1, ``window`` 10 steps: those of the published code (100 steps for summarization; and
      where None, a tenth of a training of fewer than 100). ``beta2`` below 1 makes the score Ī U, with PLATON's
      uncertainty U <- beta2 U + (1 - beta2) |I - Ī|.
    - ``start`` and ``end``: steps before and after the descent; by default 5.5 % and 27.5 % of all, its MNLI recipe's.
    - ``granularity``: one threshold for all layers (``global``, as published), or ``matrix``, each layer to its own
      ratio. A row counts with its ``in_features`` entries, and so wide layers compete fairly with narrow ones. Layers
      of one kind (rows, bitmap) share a threshold; n:m is always a choice inside groups, on the way to n of m with
      more than n (``schedules.kept_in_group``).
    - ``init``: what u, v and S are at first. ``svd``, as published; or, to measure what that is worth, random factors
      (``random_factors``) with E |u v|^2 = 0.01 |W|^2, a scale of our choice: small beside W, but a real product, where
      an adapter would start from zeros. ``random`` then has S = W, and the model starts at W + u v;
      ``random-residual`` has S = W - u v, and it computes what it did.
    - ``seed``: of the random factors, which follow from it and the layer's path alone: they are equal on every rank.

    Memory: two numbers a row of S with rows and ``beta2`` 1; otherwise two or, with ``beta2`` below 1, three a weight,
    and for n:m and bitmap a byte.

    Unlike the published code: steps are counted from 1 (there from 0), so the schedule is one step ahead; exactly as
    many rows stay as hold the target, less than one row too much (there the row at the threshold stays as well, and all
    that tie with it); and scores see each optimizer step once (there, in two of the scripts, each micro-batch). The
    published scripts also leave the model in eval mode after their first evaluation, so most of their steps are without
    dropout: the mode is the training loop's, and nothing here switches it.

    Make the optimizer after ``prepare``: the model's parameters are the factors until ``finalize``. Published settings:
    AdamW without weight decay, learning rate 5e-5 to 9e-5, 8 to 12 epochs, from the pre-trained model.
    """

    def __init__(
        self,
        config: Selection,
        *,
        beta1: float = 0.85,
        beta2: float = 1.0,
        window: int | None = None,
        start: int | None = None,
        end: int | None = None,
        granularity: str = "global",
        init: str = "svd",
        seed: int = 0,
    ) -> None:
        super().__init__(config)
        check_decay("LoSparse", "beta1", beta1)
        check_decay("LoSparse", "beta2", beta2, one=True)
        check_count("LoSparse", "window", window)
        check_granularity("LoSparse", granularity)
        if init not in INITS:
            raise ValueError(f"LoSparse: init is {init!r}, expected one of {', '.join(INITS)}")
        self.init, self.seed = init, seed
        self.beta1, self.beta2 = beta1, beta2
        self.window, self.start, self.end = window, start, end
        self.granularity = granularity

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        """``ValueError`` besides the usual: a layer whose config is no ``LowRankSparseConfig``, whose weight is frozen,
        or a schedule whose target is due before the first window of scores is over."""
        if teacher is not None:
            raise ValueError("LoSparse: takes no teacher; distil afterwards, with FactorTuning")
        return LoSparseRun(model, self, total_steps)


def random_factors(weight: Tensor, rank: int, *, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """``(u (out, rank), v (rank, in))`` of independent normal entries, in the weight's dtype, with ``E |u v|^2 =
    RANDOM_ENERGY |W|^2`` (Frobenius): variance c / out in u and c / in in v, c^2 = RANDOM_ENERGY |W|^2 / rank.

    A column of u is then as long as its row of v, as the SVD has them. Draws follow from ``seed`` and ``name``, the
    layer's path, alone: on the CPU in float64, and rounded to the weight's dtype at the end.
    """
    out_features, in_features = weight.shape
    # Not Python's hash, which differs from process to process; 32 bits are all that torch's CPU generator takes.
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    u = torch.randn(out_features, rank, generator=generator, dtype=torch.float64)
    v = torch.randn(rank, in_features, generator=generator, dtype=torch.float64)
    length = weight.detach().to("cpu", torch.float64).norm()
    root = (RANDOM_ENERGY / rank) ** 0.25 * length.sqrt()
    return (u * (root / out_features**0.5)).to(weight), (v * (root / in_features**0.5)).to(weight)


class LoSparseRun(FactoredRun):
    # mean I, smoothed Ī and uncertainty U; kept: entries of S that the last pruning left. See ``form`` for the shapes.
    kinds = {"mean": Kind(), "smoothed": Kind(), "uncertainty": Kind(), "kept": Kind(torch.int64, scalar=True)}

    @torch.no_grad()
    def __init__(self, model: nn.Module, options: LoSparse, total_steps: int) -> None:
        super().__init__(model, options.config, total_steps)
        for path, config in self.configs.items():
            if not isinstance(config, LowRankSparseConfig):
                raise ValueError(f"LoSparse: {path}: {config} has no sparse part; expected a LowRankSparseConfig")
            if not self.weight(path).requires_grad:
                raise ValueError(f"LoSparse: {path}: weight does not require grad, and S is pruned by its gradients")
        self.options = options
        self.window = min(10, max(1, total_steps // 10)) if options.window is None else options.window
        start = int(0.055 * total_steps) if options.start is None else options.start
        end = int(0.275 * total_steps) if options.end is None else options.end
        # Each kind of S has its own goal, and they share the way to it.
        self.schedules = {
            path: schedules.Cubic(kept_fraction(self._sparse(path)), total_steps, start, end, self.window)
            for path in self.configs
        }
        self._start, self._last = start, total_steps - max(end, 1)
        if self._last < self.window:
            raise ValueError(
                f"LoSparse: the target is due from step {self._last + 1} of {total_steps} on, but the first scores are "
                f"there after a window of {self.window} steps"
            )
        factors = {path: self._split(path) for path in self.configs}
        for kind in ("mean", "smoothed", "uncertainty"):
            if kind != "uncertainty" or options.beta2 < 1:
                self.new_state(kind)
        for path, count in self.new_state("kept").items():
            count.fill_(factors[path]["sparse"].numel())
        self._masks: dict[str, Tensor] | None = None
        self.factor_all(factors)

    def form(self, kind: str, path: str) -> tuple[tuple[int, ...], torch.dtype]:
        if kind == "kept":
            return (), torch.int64
        layer = self.model.get_submodule(path)
        shape = (layer.out_features,) if self._by_rows(path) else (layer.out_features, layer.in_features)
        # Means of many small numbers: not in 16 bits.
        return shape, wide(self.weight(path).dtype)  # type: ignore[return-value]

    def after_step(self) -> None:
        options = self.options
        for path in self.configs:
            sparse = self.factors(path)["sparse"]
            # A layer that took no part in this step has no gradient: it did not matter.
            gradient = torch.zeros_like(sparse) if sparse.grad is None else sparse.grad
            mean = self.state["mean"][path]
            if self._begins_window(self.step):
                scores.update_platon_(
                    self.state["smoothed"][path],
                    self._uncertainty(path),
                    mean,
                    beta1=options.beta1,
                    beta2=options.beta2,
                )
            sensitivity = self._sensitivity(path, sparse.detach(), gradient).to(mean.dtype)
            scores.update_mean_(mean, sensitivity, (self.step - 1) % self.window + 1)
        if self._begins_window(self.step) or self.step == self._last + 1:
            # What is due follows from scores that change once a window, and from the schedule.
            self._masks = None
        if self._due(self.step):
            self._prune()

    def resumed(self) -> None:
        self._masks = None

    def metrics(self) -> dict[str, float]:
        """``sparsity`` as for all factors, ``remaining``: the part of S that the last pruning left, and ``rows``: how
        many rows that are, where S is pruned by rows. Between two prunings the optimizer moves the zeros too."""
        found = super().metrics()
        kept = {path: int(count) for path, count in self.state["kept"].items()}
        sizes = {path: self.factors(path)["sparse"].shape for path in self.configs}
        found["remaining"] = sum(kept.values()) / sum(size.numel() for size in sizes.values())
        if by_rows := [path for path in self.configs if isinstance(self._sparse(path), RowsConfig)]:
            found["rows"] = sum(kept[path] // sizes[path][1] for path in by_rows)
        return found

    def stored(self, path: str) -> int:
        factors = self.factors(path)
        return factors["u"].numel() + factors["v"].numel() + int(self.state["kept"][path])

    def final_config(self, path: str, factors: Mapping[str, Tensor]) -> Config:
        """With a threshold over all layers each has its own ratio."""
        config, sparse = self._config(path), factors["sparse"]
        out_features = sparse.shape[0]
        if self.options.granularity == "matrix" or isinstance(config.sparse, NMConfig):
            return config
        if isinstance(config.sparse, BitmapConfig):
            # A density of 0 is none: at least one weight may always be kept.
            return replace(config, sparse=BitmapConfig(max(1, int(sparse.count_nonzero())) / sparse.numel()))
        alive = int((sparse != 0).any(1).sum())
        # Nor is a ratio of 0: a quarter of a row is rounded to none.
        return replace(config, sparse=RowsConfig((alive or 0.25) / out_features))

    @torch.no_grad()
    def finalize(self) -> CompressionPlan:
        """Also before the last step: S is pruned to the target by the scores that are there, or by magnitude where none
        are."""
        self._masks = None
        self._prune(self.total_steps)
        return super().finalize()

    def _config(self, path: str) -> LowRankSparseConfig:
        return self.configs[path]  # type: ignore[return-value]

    def _sparse(self, path: str) -> SparseConfig:
        return self._config(path).sparse  # type: ignore[return-value]

    def _by_rows(self, path: str) -> bool:
        """Whether one number a row says all: the mean of a product Ī U is not the product of means."""
        return isinstance(self._sparse(path), RowsConfig) and self.options.beta2 == 1

    def _split(self, path: str) -> dict[str, Tensor]:
        options, weight = self.options, self.finite_weight(path)
        rank = one_shot.rank_of(self._config(path), *weight.shape)
        if options.init == "svd":
            u, v = low_rank.factorize(weight, rank, name=path)
        else:
            u, v = random_factors(weight, rank, seed=options.seed, name=path)
        # A copy: whoever holds the old weight must not see S trained.
        sparse = weight.clone() if options.init == "random" else weight - low_rank.unpack(u, v)
        return {"u": u, "v": v, "sparse": sparse}

    def _begins_window(self, step: int) -> bool:
        """Whether optimizer step ``step``, from 1, is the first of a window: scores change only there."""
        return (step - 1) % self.window == 0

    def _uncertainty(self, path: str) -> Tensor | None:
        return self.state["uncertainty"][path] if self.options.beta2 < 1 else None

    def _sensitivity(self, path: str, sparse: Tensor, gradient: Tensor) -> Tensor:
        if not self._by_rows(path):
            return scores.sensitivity(sparse, gradient)
        product = sparse * gradient
        # The mean of |.| over each row, in one pass.
        return torch.linalg.vector_norm(product, 1, dim=1, dtype=wide(product.dtype)) / product.shape[1]

    def _score(self, path: str) -> Tensor:
        """One number a row of S, or one an entry."""
        uncertainty, score = self._uncertainty(path), self.state["smoothed"][path]
        if uncertainty is not None:
            score = score * uncertainty
        return score.mean(1) if isinstance(self._sparse(path), RowsConfig) and score.dim() == 2 else score

    def _due(self, step: int) -> bool:
        if step > self._last:
            return True
        return step > max(self._start, self.window) and self._begins_window(step)

    def _prune(self, step: int | None = None) -> None:
        """Zeros in S where this step's masks, or those of ``step``, say so."""
        if self._masks is None:
            self._masks = self._choose(self.step if step is None else step)
            for path, mask in self._masks.items():
                width = self.factors(path)["v"].shape[1] if mask.dim() == 1 else 1
                self.state["kept"][path].copy_(mask.sum() * width)
        for path, mask in self._masks.items():
            sparse = self.factors(path)["sparse"]
            dropped = mask.to(sparse.device).logical_not()
            sparse.masked_fill_(dropped.unsqueeze(1) if mask.dim() == 1 else dropped, 0.0)

    def _choose(self, step: int) -> dict[str, Tensor]:
        """Path -> True at the rows ``(out)``, or at the entries ``(out, in)``, that stay after ``step``."""
        masks: dict[str, Tensor] = {}
        if self.step <= self.window:
            for path in self.configs:
                sparse = self.factors(path)["sparse"].detach()
                masks[path] = one_shot.magnitude_mask(sparse, self._sparse(path))
            return masks
        remaining = {path: schedule.remaining(step) for path, schedule in self.schedules.items()}
        for path in self.configs:
            if isinstance(pattern := self._sparse(path), NMConfig):
                kept = schedules.kept_in_group(remaining[path], pattern.n, pattern.m)
                masks[path] = largest_in_groups(self._score(path), kept, pattern.m)
        for kind in (RowsConfig, BitmapConfig):
            if paths := [path for path in self.configs if isinstance(self._sparse(path), kind)]:
                masks |= self._largest({path: self._score(path) for path in paths}, remaining)
        return masks

    def _largest(self, found: dict[str, Tensor], remaining: Mapping[str, float]) -> dict[str, Tensor]:
        if self.options.granularity == "matrix":
            counts = {
                path: rows.row_count(remaining[path], len(score))
                if score.dim() == 1
                else bitmap.keep_count(remaining[path], *score.shape)
                for path, score in found.items()
            }
            return {path: thresholds.largest(score, counts[path]) for path, score in found.items()}
        sizes = {path: self.factors(path)["sparse"].shape for path in found}
        count = round(sum(remaining[path] * size.numel() for path, size in sizes.items()))
        if all(score.dim() == 1 for score in found.values()):
            return thresholds.largest_rows_overall(found, {path: size[1] for path, size in sizes.items()}, count)
        return thresholds.largest_overall(found, count)
