"""Low-rank baselines: the truncated SVD of each weight, plain or weighted by its gradients, and training afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.configs import LowRankConfig
from sparsebert.formats import low_rank, one_shot
from sparsebert.formats.common import wide
from sparsebert.methods.base import Method, Run
from sparsebert.methods.fixed_factors import FixedFactorsRun
from sparsebert.methods.maths import factors
from sparsebert.plan import Selection, select


class SVD(Method):
    """W ≈ u v at the start, the nearest matrix of that rank, and then u and v are trained in its place.

    - ``LowRankConfig``: u v is the truncated SVD. With ``rows``, weights ``(out)`` on the rows of each layer by its
      path, it is the nearest in the norm that weights them: FWSVD with those of ``fisher_row_weights`` (Hsu et al.:
      Language model compression with weighted low-rank factorization, ICLR 2022).
    - ``LowRankSparseConfig``: S, the largest of what is left of W, is kept too and trained, and its zeros hold:
      LoSparse without its pruning.

    Start from a fine-tuned model. A rank that a ratio means is rounded down. ``ValueError`` in ``prepare`` for another
    config, and for ``rows`` that are not those of the layers.
    """

    def __init__(self, config: Selection, *, rows: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config)
        self.rows = None if rows is None else dict(rows)

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        self._refuse_teacher(teacher)
        return SVDRun(model, self.config, total_steps, self.rows)


class SVDRun(FixedFactorsRun):
    @torch.no_grad()
    def __init__(
        self, model: nn.Module, selection: Selection, total_steps: int, rows: Mapping[str, Tensor] | None
    ) -> None:
        super().__init__(model, selection, total_steps)
        if rows is not None and (stray := sorted(rows.keys() ^ self.configs.keys())):
            what = "no row weights of it" if stray[0] in self.configs else "row weights, but it is not factored"
            raise ValueError(f"SVD: {stray[0]}: {what}")
        self.factor_all({path: self._split(path, None if rows is None else rows[path]) for path in self.configs})

    def _split(self, path: str, rows: Tensor | None) -> dict[str, Tensor]:
        weight, config = self.finite_weight(path), self.configs[path]
        rank = one_shot.rank_of(config, *weight.shape)  # type: ignore[arg-type]
        u, v = factors.weighted_svd(weight, rank, rows=rows, name=path)
        if isinstance(config, LowRankConfig):
            return {"u": u, "v": v}
        left = weight - low_rank.unpack(u, v)
        mask = one_shot.magnitude_mask(left, config.sparse)  # type: ignore[union-attr, arg-type]
        return {"u": u, "v": v, "sparse": left.masked_fill_(mask.logical_not(), 0.0)}


def fisher_row_weights(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    selection: Selection,
    *,
    loss: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
    epsilon: float = 1e-5,
) -> dict[str, Tensor]:
    """FWSVD's weights of the rows of every layer that ``selection`` chooses, ``SVD(selection, rows=...)``.

    With G the gradient of the loss for one batch, F_ij = mean over ``batches`` of G_ij² is the empirical Fisher
    information, and a row's weight sqrt(sum_j F_ij + epsilon); ``epsilon`` 1e-5 is that of code around the method. Run
    it on the fine-tuned model before ``prepare``. ``batches`` are what the model is called with; ``loss(outputs,
    inputs)`` is by default ``outputs.loss``, and so batches need labels. Nothing in the model changes, not even its
    gradients, and its mode stays too: call ``model.eval()`` for gradients without dropout.

    ``ValueError`` for no batches, a frozen weight, or NaN or infinities.
    """
    chosen, _ = select(model, selection)
    weights: dict[str, nn.Parameter] = {path: model.get_submodule(path).weight for path in chosen}  # type: ignore[misc]
    for path, weight in weights.items():
        if not weight.requires_grad:
            raise ValueError(f"fisher_row_weights: {path}: weight does not require grad")
    sums = {path: torch.zeros(len(w), dtype=wide(w.dtype), device=w.device) for path, w in weights.items()}
    count = 0
    for inputs in batches:
        with torch.enable_grad():
            outputs = model(**inputs)
            value = outputs.loss if loss is None else loss(outputs, inputs)
            if value is None:
                raise ValueError("fisher_row_weights: the model gives no loss; batches need labels, or give loss=")
            gradients = torch.autograd.grad(value, list(weights.values()), materialize_grads=True)
        for path, gradient in zip(weights, gradients, strict=True):
            # Squares of small numbers: not in 16 bits.
            sums[path] += gradient.to(sums[path].dtype).square_().sum(1)
        count += 1
    if not count:
        raise ValueError("fisher_row_weights: no batches")
    for path, total in sums.items():
        if not torch.isfinite(total).all():
            raise ValueError(f"fisher_row_weights: {path}: gradients hold NaN or infinities")
    return {path: factors.fisher_row_weights(total / count, epsilon) for path, total in sums.items()}
