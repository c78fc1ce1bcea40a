"""The low-rank format: a weight as the product of two thin matrices, W = u v.

For a weight ``(out, in)`` at rank r the stored form is two row-major tensors of one dtype:

- ``u (out, r)``, float;
- ``v (r, in)``, float.

**Parts.** Weights of one size and rank, one under the other, are held as one of as many ``parts``: ``u (out, r)`` has
their rows, ``v (parts * r, in)`` their ranks, and the rows of each are multiplied with the ranks of its own. Only in
memory: what lies on disk has one part.

They cost r (out + in) parameters, fewer than out * in where r < out * in / (out + in), and the linear becomes two thin
products, y = (x vᵀ) uᵀ. The factors are what is stored and trained, so any finite pair is valid: unlike in the sparse
formats a weight has many. ``factorize`` gives the best one: by Eckart and Young (The approximation of one matrix by
another of lower rank, Psychometrika 1, 1936) no matrix of rank r is nearer to W in the Frobenius norm than the
truncated singular value decomposition.

All functions also take meta tensors, where they compute shapes alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsebert.formats.common import (
    DTYPES,
    check_matrix,
    check_one_device,
    check_tensor,
    dtype_name,
    no_autocast,
    refuse_non_finite,
    whole_below,
    wide,
)


def packed_shapes(
    rank: int, out_features: int, in_features: int, parts: int = 1
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of ``u`` and ``v``; ``ValueError`` where ``out_features`` is not so many ``parts`` of one size."""
    if parts < 1 or out_features % parts:
        raise ValueError(f"low_rank: parts is {parts}, expected a number that divides out_features={out_features}")
    return (out_features, rank), (parts * rank, in_features)


def rank_for_ratio(ratio: float, out_features: int, in_features: int) -> int:
    """``floor(ratio * out * in / (out + in))``: the rank whose factors hold ``ratio`` of the dense parameters.

    At least 1 and at most min(out, in). ``ValueError`` unless ``ratio`` is above 0 and the weight has a rank at all.
    """
    if not 0 < ratio < math.inf:
        raise ValueError(f"rank_for_ratio: ratio is {ratio}, expected a number above 0")
    full = _full_rank(out_features, in_features, "rank_for_ratio")
    return min(max(whole_below(ratio * (out_features * in_features) / (out_features + in_features)), 1), full)


def factorize(weight: Tensor, rank: int, *, name: str = "weight") -> tuple[Tensor, Tensor]:
    """``weight (out, in)`` -> ``(u, v)`` with ``u v`` the nearest matrix of ``rank`` (Frobenius): a truncated SVD.

    W = U S Vᵀ gives u = U √S and v = √S Vᵀ of the ``rank`` largest singular values, so that both factors have the same
    scale. Computed in float32 (a float64 weight: in float64) and rounded to the weight's dtype. The sign of each pair
    of singular vectors, which is arbitrary, is such that the largest |entry| of u's column (the first of equals) is
    positive. ``name`` is the layer's path, for the error a weight with NaN or infinities is refused with.
    """
    check_matrix(weight, DTYPES, name)
    out_features, in_features = weight.shape
    _check_rank(rank, out_features, in_features, name)
    weight = weight.detach()
    if weight.is_meta:
        return weight.new_empty(out_features, rank), weight.new_empty(rank, in_features)
    refuse_non_finite(weight, f"{name}: weight")
    left, singular, right = torch.linalg.svd(weight.to(wide(weight.dtype)), full_matrices=False)
    left, right = left[:, :rank], right[:rank]
    largest = left.abs().argmax(0, keepdim=True)
    signs = torch.where(left.gather(0, largest) < 0, -1.0, 1.0).to(left.dtype)
    root = singular[:rank].sqrt()
    u, v = left * (signs * root), right * (signs * root).t()
    return u.to(weight.dtype).contiguous(), v.to(weight.dtype).contiguous()


def unpack(u: Tensor, v: Tensor, parts: int = 1) -> Tensor:
    """``(u, v)`` -> the dense weight ``u v`` ``(out, in)`` in their dtype; 16-bit factors are rounded once, at the end.

    Trusts its input (see ``validate``) except for shapes and dtypes.
    """
    fit = u.dim() == v.dim() == 2 and parts * u.shape[1] == v.shape[0] and not u.shape[0] % parts
    if not fit or u.dtype != v.dtype:
        ranks = "rank" if parts == 1 else f"{parts} * rank"
        raise ValueError(
            f"unpack: u {tuple(u.shape)} {dtype_name(u.dtype)} and v {tuple(v.shape)} {dtype_name(v.dtype)}, expected "
            f"(out_features, rank) and ({ranks}, in_features) of one dtype"
        )
    if u.is_meta:
        return torch.empty(u.shape[0], v.shape[1], dtype=u.dtype, device=u.device)
    if parts > 1:
        # As each would be unpacked by itself, to the bit.
        return torch.cat([unpack(*factors) for factors in zip(u.chunk(parts), v.chunk(parts), strict=True)])
    with no_autocast(u.device):
        return (u.detach().to(wide(u.dtype)) @ v.detach().to(wide(v.dtype))).to(u.dtype)


def validate(
    u: Tensor,
    v: Tensor,
    rank: int,
    out_features: int,
    in_features: int,
    *,
    parts: int = 1,
    name: str = "low_rank",
) -> None:
    """``ValueError`` naming ``name``, the tensor, expected and actual unless these are factors of such a weight.

    Checked: rank from 1 to min(out, in) of a part, shapes, one float dtype, one device, finite numbers.
    """
    u_shape, v_shape = packed_shapes(rank, out_features, in_features, parts)
    _check_rank(rank, out_features // parts, in_features, name)
    check_tensor(u, u_shape, DTYPES, f"{name}: u", f" for rank={rank}")
    check_tensor(v, v_shape, DTYPES, f"{name}: v", f" for rank={rank}")
    if u.dtype != v.dtype:
        raise ValueError(f"{name}: u is {dtype_name(u.dtype)}, v {dtype_name(v.dtype)}, expected one dtype")
    check_one_device(name, u=u, v=v)
    if not u.is_meta:
        refuse_non_finite(u, f"{name}: u")
        refuse_non_finite(v, f"{name}: v")


def _full_rank(out_features: int, in_features: int, name: str) -> int:
    if not (full := min(out_features, in_features)) > 0:
        raise ValueError(f"{name}: weight is ({out_features}, {in_features}), expected at least one row and one column")
    return full


def _check_rank(rank: int, out_features: int, in_features: int, name: str) -> None:
    full = _full_rank(out_features, in_features, name)
    if not 1 <= rank <= full:
        raise ValueError(f"{name}: rank is {rank}, expected 1 to {full} for ({out_features}, {in_features})")
