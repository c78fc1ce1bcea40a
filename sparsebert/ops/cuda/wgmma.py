"""The kernel on Hopper's wgmma (``csrc/wgmma``), dense and 2:4: what it can run, in which configurations, what is
estimated of it, and one call.

It has run on no GPU yet, so it waits until it is measured or forced.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsebert.ops.cuda import calls, extension
from sparsebert.ops.cuda.calls import address
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.low_rank import PADDED, padded_rank
from sparsebert.ops.select import Problem
from sparsebert.ops.specs import Int8Spec, LowRankSparseSpec

# `Pattern` of csrc/wgmma/problem.h.
DENSE, NM24 = 0, 1
# wgmma is in no other.
CAPABILITY, TARGET = (9, 0), "90a"
# Of the rows that are copied as tiles, x, values, t and u: where they begin and how long they are.
ROW_BYTES = 16
# Layouts that hold a 2:4 weight as it lies on disk: the second beside factors with ranks filled up to a multiple of 16.
AS_STORED = (NEUTRAL, PADDED)
# Why a kernel of this architecture does not run unmeasured, with what is estimated of it.
WAITS = "not measured here, and no GPU has run it yet{} (sb.tune measures it)"
# Of features: a tile has those of one part of the factors, and the smallest has so many.
PART_MULTIPLE = 128


class Config(NamedTuple):
    """A tile of ``csrc/wgmma/problem.h`` with its sides, and the blocks of a cluster: those that lie side by side and
    load their tokens together, or those that divide the inputs among them."""

    tile: int
    features: int
    tokens: int
    sharing: int
    splits: int


# Where it runs


def refusal(problem: Problem) -> str | None:
    """None, or why the kernel cannot run ``problem``."""
    if reason := unfit(problem):
        return reason
    capability = problem.device.capability
    if capability is not None and capability != CAPABILITY:
        return "needs compute capability {}.{}, found {}.{}".format(*CAPABILITY, *capability)
    if reason := extension.refusal(problem.device):
        return reason
    if reason := missing():
        return reason
    if TARGET not in (archs := extension.load().build_info()["archs"]):
        return f"needs sparsebert._C compiled for sm_{TARGET}, found {', '.join(f'sm_{arch}' for arch in archs)}"
    return None


def missing() -> str | None:
    """None, or why this installation has no such kernel."""
    if reason := extension.missing():
        return reason
    if hasattr(extension.load(), "wgmma_linear"):
        return None
    return "sparsebert._C was built before it had this kernel; SPARSEBERT_CUDA=1 builds it at installation"


def unfit(problem: Problem) -> str | None:
    """None, or why no device can run ``problem`` by this kernel."""
    spec = problem.spec
    if (pattern := pattern_of(problem)) is None:
        if getattr(spec, "sparse", "nm") != "nm":
            return f"needs a sparse part at 2:4, not {spec.sparse}"
        return f"needs a 2:4 pattern, not {spec.n}:{spec.m}"
    integer = isinstance(spec, Int8Spec)
    # Of the kept values, which are half of a row at 2:4.
    multiple = ROW_BYTES // (1 if integer else 2) * (2 if pattern == NM24 else 1)
    if spec.in_features % multiple:
        return f"needs in_features in multiples of {multiple}, not {spec.in_features}"
    rank, parts = _factors(problem)
    # Beside the ranks of a part in t lie those of the next, and a product takes 16.
    multiple = ROW_BYTES // 2 if parts == 1 else 16
    if rank % multiple:
        return f"needs a rank in multiples of {multiple}, not {rank}"
    if parts > 1 and spec.out_features % (parts * PART_MULTIPLE):
        return f"needs parts with features in multiples of {PART_MULTIPLE}, not {spec.out_features // parts}"
    return calls.unserved(problem.dtype, integer=integer)


def pattern_of(problem: Problem) -> int | None:
    """That of the weight as the layout holds it; None where it is neither dense nor 2:4. 1:4 and 1:2 do not lie as 2:4
    does."""
    spec = problem.spec
    if problem.layout not in AS_STORED or (getattr(spec, "m", 1) == 1 and not hasattr(spec, "sparse")):
        return DENSE
    return NM24 if (spec.n, spec.m) == (2, 4) else None


def _factors(problem: Problem) -> tuple[int, int]:
    """Rank and parts of what is added by factors; 0 and 1 where nothing is."""
    spec = problem.spec
    if not isinstance(spec, LowRankSparseSpec) or problem.layout not in AS_STORED:
        return 0, 1
    return (spec.rank if problem.layout == NEUTRAL else padded_rank(spec.rank)), spec.parts


# What is estimated


def configurations(problem: Problem) -> Sequence[Config]:
    """The solutions that ``_C`` finds for the sizes of a problem, the estimated best first."""
    return tuple(config for config, _ in _solutions(problem))


def waits(problem: Problem) -> str:
    """Why the kernel does not run unmeasured; of a 2:4 weight also what is estimated."""
    estimate = ""
    if pattern_of(problem) == NM24:
        estimate = f": estimated at {estimated_ratio(problem):.2f} of the dense kernel's time"
    return WAITS.format(estimate)


def estimated_ratio(problem: Problem) -> float:
    """Clocks of the best solution at 2:4, factors included, over those of the best for the dense weight: an estimate
    from sizes, no measurement."""
    return _solutions(problem)[0][1] / _solutions(problem, dense=True)[0][1]


def _solutions(problem: Problem, *, dense: bool = False) -> tuple[tuple[Config, float], ...]:
    """Configurations and the clocks they are estimated to take, best first; ``dense``: of the weight as a dense one."""
    spec = problem.spec
    rank, parts = (0, 1) if dense else _factors(problem)
    return _of_sizes(
        element=calls.ELEMENTS[torch.int8 if isinstance(spec, Int8Spec) else problem.dtype],
        pattern=DENSE if dense else pattern_of(problem),
        tokens=max(1, problem.tokens),
        in_features=spec.in_features,
        out_features=spec.out_features,
        rank=rank,
        parts=parts,
        sms=problem.device.sms,
    )


# By sizes alone: specs of two ops may be equal as tuples.
@lru_cache(maxsize=4096)
def _of_sizes(**sizes: Any) -> tuple[tuple[Config, float], ...]:
    return tuple((Config(*config), clocks) for *config, clocks in extension.load().wgmma_solutions(**sizes))


# A call


def linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor | None,
    bias: Tensor | None,
    *,
    activation: str = "none",
    config: Config,
    t: Tensor | None = None,
    u: Tensor | None = None,
    parts: int = 1,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    x_scale: Tensor | None = None,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    output_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """y = activation(alpha (x Wᵀ + t uᵀ) + b) + residual, ``(tokens, out)`` in ``dtype`` (that of x).

    ``x (tokens, in)`` fp16, bf16 or int8; ``values (out, in)``, or with ``positions`` those of ``formats.nm`` at 2:4,
    ``(out, in / 2)``; ``t (tokens, parts * rank)`` and ``u (out, rank)``, each part of the features with ranks of its
    own, rank a multiple of 8, of 16 where there are several; ``residual (tokens, out)`` in ``dtype``, which has 16 bits
    then. int8 x: ``x_scale fp32 (tokens)``, ``scales fp32 (out)``, y = activation((sums x_scale) scales + b), int8
    again by ``output_scale fp32 ()``, whose scales a row go to ``y_scale fp32 (tokens)``. ``ValueError`` where
    something does not fit.

    Rows of ``x`` may lie apart, at multiples of 16 bytes; what is not as the kernel reads it is copied. On the current
    stream of x's device; may be captured in a CUDA graph.
    """
    y = x.new_empty((len(x), len(values)), dtype=torch.int8 if output_scale is not None else dtype or x.dtype)
    if not y.numel():
        return y
    # Copies live until the call is launched; after that the stream's order keeps them.
    x, values, bias = copyable(x), whole(values), None if bias is None else bias.contiguous()
    positions, t, u, residual = (None if one is None else whole(one) for one in (positions, t, u, residual))
    tensors = {"t": t, "u": u, "bias": bias, "residual": residual, "x_scale": x_scale, "scales": scales}
    extension.load().wgmma_linear(
        **product(x, values, positions, y, alpha=alpha, **tensors),
        parts=parts,
        tile=config.tile,
        sharing=config.sharing,
        splits=config.splits,
        output_scale=address(output_scale),
        y_scale=address(y_scale),
        activation=calls.ACTIVATIONS[activation],
    )
    return y


def product(
    x: Tensor, values: Tensor, positions: Tensor | None, y: Tensor, *, u: Tensor | None, **more: Any
) -> dict[str, Any]:
    """The keywords that the calls of all kernels of this folder have; ``more`` as ``calls.product`` takes it."""
    rank = 0 if u is None else u.shape[1]
    place = calls.place_of(x)
    keywords = calls.product(x, values, y, place, in_features=x.shape[1], rank=rank, u=u, **more)
    return keywords | {"pattern": DENSE if positions is None else NM24, "positions": address(positions)}


def copyable(x: Tensor) -> Tensor:
    """x, or a copy where its rows have gaps or overlap, or do not begin at multiples of 16 bytes."""
    apart = x.stride(0) >= x.shape[1] and x.stride(0) * x.element_size() % ROW_BYTES == 0
    if x.stride(1) == 1 and x.data_ptr() % ROW_BYTES == 0 and (apart or len(x) == 1):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy where it has gaps or does not begin at a multiple of 16 bytes: a weight may be a view."""
    if tensor.is_contiguous() and tensor.data_ptr() % ROW_BYTES == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
