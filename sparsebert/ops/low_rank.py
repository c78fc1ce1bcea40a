"""``sparsebert::low_rank_linear``: y = activation((x vᵀ) uᵀ + b), with u ``(out, rank)`` and v ``(rank, in)``.

The factors are used as factors: 2 T rank (in + out) operations for T tokens instead of 2 T in out. See ``ops.linear``
for the contract. The layout ``dense`` holds the product beside the factors, which cannot be told from it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.formats import low_rank
from sparsebert.ops import layouts, reference, select
from sparsebert.ops.activations import activate
from sparsebert.ops.layouts import COMPUTE, Held
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import LowRankSparseSpec, LowRankSpec

OP = "low_rank_linear"
# The layout of factors whose rank is a multiple of 16, zeros at its end: what GPUs take in a product, in aligned rows.
PADDED = "padded"
RANK_MULTIPLE = 16


def padded_rank(rank: int) -> int:
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def low_rank_linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, *, layout: str, **sizes: Any) -> Tensor:
    """y = activation((x vᵀ) uᵀ + b); keywords ``rank, in_features, out_features, parts=1, activation``.

    ``weight`` in layout ``neutral``: ``u (out, rank)`` and ``v (parts * rank, in)``, of so many products one under the
    other (``formats.low_rank``). Errors as those of ``nm_linear``.
    """
    return torch.ops.sparsebert.low_rank_linear(x, weight, bias, layout=layout, **sizes)


def tensors(spec: LowRankSpec) -> dict[str, Held]:
    return factors(spec, spec.rank)


def factors(spec: LowRankSpec | LowRankSparseSpec, rank: int) -> dict[str, Held]:
    """u and v, held with ``rank`` ranks a part."""
    u, v = low_rank.packed_shapes(rank, spec.out_features, spec.in_features, spec.parts)
    return {"u": Held(u, COMPUTE), "v": Held(v, COMPUTE)}


def unpack(weight: list[Tensor], spec: LowRankSpec, dtype: torch.dtype | None = None) -> Tensor:
    """The product, in the factors' dtype."""
    return low_rank.unpack(weight[0], weight[1], spec.parts)


def multiply(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    """torch's linear on each factor."""
    u, v = weight
    return activate(reference.through_u(F.linear(x, v), u, bias, problem.spec.parts), problem.activation)


layouts.add(layouts.neutral(OP, tensors, unpack))
layouts.add(layouts.dense_and_neutral(OP))

select.add_candidate(
    Candidate(OP, layouts.NEUTRAL, "reference", "torch's linear on each factor", reference.always, multiply)
)
select.add_candidate(reference.unpacked(OP, layouts.DENSE))
