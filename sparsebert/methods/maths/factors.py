"""Low-rank factors of a weight under weights on its rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebert.formats import low_rank
from sparsebert.formats.common import wide

# Rows and columns with a weight below this part of the largest one count as having it: dividing by less amplifies
# noise.
FLOOR = 1e-3


def weighted_svd(
    weight: Tensor, rank: int, *, rows: Tensor | None = None, columns: Tensor | None = None, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """``(u (out, rank), v (rank, in))`` that minimize ``|Dr (W - u v) Dc|`` (Frobenius).

    ``rows (out)`` and ``columns (in)`` are the diagonals of Dr and Dc, at least 0 and not all 0; None is the identity.
    Weights are raised to ``FLOOR`` of the largest. The minimum is the truncated SVD of Dr W Dc = P S Qᵀ: u = Dr⁻¹ P √S
    A, v = A⁻¹ √S Qᵀ Dc⁻¹. The diagonal A, which the product does not show, makes each column of u as long as its row of
    v: otherwise the scale of the weights would set how fast an optimizer such as Adam trains one factor against the
    other. Where a row of W is zero, so is that of u. Without weights this is ``formats.low_rank.factorize``. With row
    weights alone: FWSVD, Hsu et al.: Language model compression with weighted low-rank factorization (ICLR 2022).
    """
    left = _diagonal(rows, weight.shape[0], weight, f"{name}: row weights")
    right = _diagonal(columns, weight.shape[1], weight, f"{name}: column weights")
    # Rounded to the weight's dtype once, at the end.
    scaled = weight.detach().to(wide(weight.dtype))
    if left is not None:
        scaled = scaled * left.unsqueeze(1)
    if right is not None:
        scaled = scaled * right
    u, v = low_rank.factorize(scaled, rank, name=name)
    if left is not None or right is not None:
        u = u if left is None else u / left.unsqueeze(1)
        v = v if right is None else v / right
        lengths = torch.stack([u.norm(dim=0), v.norm(dim=1)])
        # A component without length stays as it is: there is nothing to balance.
        balance = torch.where((lengths > 0).all(0), (lengths[1] / lengths[0]).sqrt(), 1.0)
        u, v = u * balance, v / balance.unsqueeze(1)
    u.masked_fill_((scaled == 0).all(1, keepdim=True), 0.0)
    return u.to(weight.dtype), v.to(weight.dtype)


def fisher_row_weights(squared_gradients: Tensor, epsilon: float = 1e-5) -> Tensor:
    """FWSVD's row weights sqrt(sum_j F_ij + epsilon) of the mean squared gradients F; given is their sum over each row,
    ``(out)``. ``epsilon`` is that of code around the method: it keeps rows without any gradient in play."""
    return (squared_gradients + epsilon).sqrt()


def importance_of_kept(sparse: Tensor, weighting: str) -> tuple[Tensor | None, Tensor | None]:
    """Row weights ``(out)`` and column weights ``(in)`` for ``weighted_svd`` from what pruning left of ``sparse (out,
    in)``, with k the number of non-zeros of a row or column:

    - ``none``: no weights, the plain SVD;
    - ``row-share``: rows k / sum k;
    - ``rows``: rows sqrt k, so that a row's squared error counts once for each weight that it kept;
    - ``rows-columns``: sqrt k of rows and of columns.
    """
    kept = sparse != 0
    rows = kept.sum(1).to(wide(sparse.dtype))
    if weighting == "none":
        return None, None
    if weighting == "row-share":
        return rows / rows.sum(), None
    if weighting == "rows":
        return rows.sqrt(), None
    if weighting == "rows-columns":
        return rows.sqrt(), kept.sum(0).to(rows.dtype).sqrt()
    raise ValueError(f"importance_of_kept: weighting is {weighting!r}, expected none, row-share, rows or rows-columns")


def _diagonal(values: Tensor | None, size: int, like: Tensor, label: str) -> Tensor | None:
    if values is None:
        return None
    if tuple(values.shape) != (size,):
        raise ValueError(f"{label}: shape {tuple(values.shape)}, expected ({size},)")
    if not torch.isfinite(values).all() or bool((values < 0).any()) or not bool((values > 0).any()):
        raise ValueError(f"{label}: expected finite numbers, none below 0 and some above")
    # By the largest first: numbers near the end of a dtype's range stay inside it.
    values = values.to(like.device, wide(like.dtype))
    return (values / values.max()).clamp_(min=FLOOR)
