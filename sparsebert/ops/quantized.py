"""Ops on rows that are int8 already, so that layers can follow each other without floats in between.

- ``quantize_rows(x, input_scale=None, activation="none") -> (q, s)``: activation(x) in fp32 as int8 and a scale a row;
- ``int8_linear_from_int8(q, s, weight, bias, ...) -> y``: what ``int8_linear`` computes once x is quantized;
- ``int8_linear_to_int8(q, s, weight, bias, output_scale, ...) -> (q_y, s_y)``: the same, its result rounded to int8 by
  the static ``output_scale ()``, as ``quantize_rows(y, output_scale)`` rounds, from fp32.

``q int8 (..., features)`` and ``s fp32 (...)`` are symmetric: there are no zero points, and tensors that have one are
refused. A row whose ``s`` is not finite stands for numbers that were not, and stays so: y is NaN there, and s_y. No
gradients: an inference path. Backends are those of ``int8_linear``, chosen alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsebert.formats import int8
from sparsebert.ops import linear, reference, select
from sparsebert.ops.activations import ACTIVATIONS, activate
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import Int8Spec, RowsSpec

OP = "quantize_rows"
_FIELDS = "str layout, str activations, int n, int m, int in_features, int out_features, str activation='none'"


def quantize_rows(x: Tensor, input_scale: Tensor | None = None, *, activation: str = "none") -> tuple[Tensor, Tensor]:
    """``x (..., features)``, any float dtype -> int8 of the same shape and fp32 scales ``(...)`` of activation(x), as
    ``formats.int8`` rounds; with ``input_scale ()`` that one for all rows. ``ValueError`` where x is not."""
    return torch.ops.sparsebert.quantize_rows(x, input_scale, activation=activation)


def int8_linear_from_int8(
    q: Tensor, s: Tensor, weight: list[Tensor], bias: Tensor | None, *, dtype: torch.dtype, layout: str, **sizes: Any
) -> Tensor:
    """y = activation((q Q_wᵀ) s s_w + b) in ``dtype``, ``(..., out)``; other keywords and ``weight`` as for
    ``int8_linear``, whose ``input_scale`` plays no part here. ``bias (out)`` in any float dtype."""
    return torch.ops.sparsebert.int8_linear_from_int8(q, s, weight, bias, dtype=dtype, layout=layout, **sizes)


def int8_linear_to_int8(
    q: Tensor,
    s: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    output_scale: Tensor,
    *,
    layout: str,
    **sizes: Any,
) -> tuple[Tensor, Tensor]:
    """y as for ``int8_linear_from_int8`` in fp32, then clamp(rint(y / output_scale), -127, 127): int8 ``(..., out)``,
    and scales fp32 ``(...)``, which are ``output_scale ()`` in every row that is finite."""
    return torch.ops.sparsebert.int8_linear_to_int8(q, s, weight, bias, output_scale, layout=layout, **sizes)


def define(library: torch.library.Library) -> None:
    """Defines the three ops with their fakes."""
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(
        "quantize_rows(Tensor x, Tensor? input_scale=None, *, str activation='none') -> (Tensor, Tensor)", tags=tags
    )
    library.define(
        "int8_linear_from_int8(Tensor q, Tensor s, Tensor[] weight, Tensor? bias, *, ScalarType dtype, "
        f"{_FIELDS}) -> Tensor",
        tags=tags,
    )
    library.define(
        "int8_linear_to_int8(Tensor q, Tensor s, Tensor[] weight, Tensor? bias, Tensor output_scale, *, "
        f"{_FIELDS}) -> (Tensor, Tensor)",
        tags=tags,
    )
    for name, run, fake in (
        ("quantize_rows", _quantize_rows, _quantize_rows_fake),
        ("int8_linear_from_int8", _from_int8, _from_int8_fake),
        ("int8_linear_to_int8", _to_int8, _to_int8_fake),
    ):
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sparsebert::{name}", fake, lib=library)


def _check_rows(x: Tensor, input_scale: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"{OP}: x is {x.dtype} with {x.dim()} dimensions, expected floats with at least 1")
    if input_scale is not None:
        check_scale(OP, "input_scale", input_scale, (), x.device)


def check_scale(op: str, name: str, scale: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """``ValueError`` or ``TypeError`` naming op and tensor unless ``scale`` is a float of this shape and device."""
    if scale.shape != shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(scale.shape)}, expected {tuple(shape)}, symmetric: without a zero point"
        )
    if not scale.is_floating_point():
        raise TypeError(f"{op}: {name} is {scale.dtype}, expected a floating-point tensor")
    if scale.device != device:
        raise ValueError(f"{op}: {name} is on {scale.device}, expected {device} as the others")


def _quantize_rows(x: Tensor, input_scale: Tensor | None = None, *, activation: str = "none") -> tuple[Tensor, Tensor]:
    _check_rows(x, input_scale, activation)
    problem = select.problem_of(RowsSpec(OP, x.shape[-1]), NEUTRAL, x, activation)
    return select.choose_between(problem).candidate.run(x, input_scale, problem)


def _quantize_rows_fake(
    x: Tensor, input_scale: Tensor | None = None, *, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    _check_rows(x, input_scale, activation)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _check(
    op: str,
    q: Tensor,
    s: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    output_scale: Tensor | None = None,
    *,
    layout: str,
    activation: str = "none",
    **sizes: Any,
) -> Int8Spec:
    """The spec of a call whose tensors fit."""
    spec = Int8Spec(**sizes)
    linear.check(q, weight, bias, layout, spec, activation, op=op, x_name="q", quantized=True)
    check_scale(op, "s", s, q.shape[:-1], q.device)
    if output_scale is not None:
        check_scale(op, "output_scale", output_scale, (), q.device)
    return spec


def _solve(
    q: Tensor, s: Tensor, spec: Int8Spec, dtype: torch.dtype, *, layout: str, activation: str = "none", **sizes: Any
) -> tuple[Tensor, Tensor, select.Solution, Problem]:
    """q and s as ``(tokens, in)`` and ``(tokens)``, and what runs them."""
    problem = select.problem_of(spec, layout, q, activation)._replace(dtype=dtype)
    rows = q.reshape(-1, spec.in_features).contiguous()
    return rows, s.float().reshape(-1).contiguous(), select.choose(problem), problem


def _from_int8(
    q: Tensor, s: Tensor, weight: list[Tensor], bias: Tensor | None, *, dtype: torch.dtype, **options: Any
) -> Tensor:
    spec = _check("int8_linear_from_int8", q, s, weight, bias, **options)
    rows, scales, solution, problem = _solve(q, s, spec, dtype, **options)
    kernels: Any = solution.candidate.run
    y = kernels.multiply(rows, scales, weight, bias, problem, **solution.options)
    return y.view(*q.shape[:-1], spec.out_features)


def _from_int8_fake(
    q: Tensor, s: Tensor, weight: list[Tensor], bias: Tensor | None, *, dtype: torch.dtype, **options: Any
) -> Tensor:
    spec = _check("int8_linear_from_int8", q, s, weight, bias, **options)
    return q.new_empty((*q.shape[:-1], spec.out_features), dtype=dtype)


def _to_int8(
    q: Tensor, s: Tensor, weight: list[Tensor], bias: Tensor | None, output_scale: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    spec = _check("int8_linear_to_int8", q, s, weight, bias, output_scale, **options)
    # The dtype that the layer runs in as part of its model: configurations are measured there.
    rows, scales, solution, problem = _solve(q, s, spec, torch.float32 if bias is None else bias.dtype, **options)
    kernels: Any = solution.candidate.run
    y, y_scales = kernels.again(rows, scales, weight, bias, output_scale, problem, **solution.options)
    return y.view(*q.shape[:-1], spec.out_features), y_scales.view(q.shape[:-1])


def _to_int8_fake(
    q: Tensor, s: Tensor, weight: list[Tensor], bias: Tensor | None, output_scale: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    spec = _check("int8_linear_to_int8", q, s, weight, bias, output_scale, **options)
    return q.new_empty((*q.shape[:-1], spec.out_features)), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _reference(x: Tensor, input_scale: Tensor | None, problem: Problem) -> tuple[Tensor, Tensor]:
    # What the activation gives is quantized from fp32, not rounded to x's dtype before.
    y = x if problem.activation == "none" else activate(x.float(), problem.activation)
    return int8.quantize_rows(y, input_scale)


select.add_candidate(Candidate(OP, NEUTRAL, "reference", "by torch's own ops", reference.always, _reference))
