"""LayerNorm after a residual connection, in one read of both, and its rows as int8 for the linear that follows.

- ``add_layer_norm(x, residual, weight, bias, eps) -> y``: y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias with
  z = x + residual, over the last dimension; var is the biased one, about the mean;
- ``add_layer_norm_quantize(x, residual, weight, bias, eps, input_scale=None) -> (y, q, s)``: the same y, and
  ``quantize_rows(y, input_scale)`` of it as it is stored, rounded to its dtype: ``formats.int8`` to the bit.

Of 16-bit tensors all is computed in fp32, and z is not rounded before it is normalized, as it is where the addition is
an op of its own. Of fp32 and fp64 (the reference alone) it is computed in their own dtype. A row of z with NaN or an
infinity gives a row of NaN, and no other is touched. No gradients: an inference path. No autocast rule either: the
result is in x's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.formats import int8
from sparsebert.formats.common import DTYPES
from sparsebert.ops import inference, reference, select
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.quantized import check_scale
from sparsebert.ops.select import Candidate
from sparsebert.ops.specs import RowsSpec

OP, QUANTIZE_OP = "add_layer_norm", "add_layer_norm_quantize"


def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``x (..., features)``, any float dtype and strides, and ``residual`` likewise, or None -> y, contiguous, of the
    same shape and dtype. ``weight`` and ``bias (features)`` in any float dtype. ``ValueError`` or ``TypeError`` where
    they do not fit, ``RuntimeError`` where a gradient is asked for."""
    return torch.ops.sparsebert.add_layer_norm(x, residual, weight, bias, eps)


def add_layer_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, input_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y as ``add_layer_norm`` gives it, ``q int8 (..., features)`` and scales fp32 ``(...)`` of y, with ``input_scale
    ()`` that one for all rows. A row that is not finite has a scale that is not."""
    return torch.ops.sparsebert.add_layer_norm_quantize(x, residual, weight, bias, eps, input_scale)


def define(library: torch.library.Library) -> None:
    """Defines both ops with their fakes."""
    tensors = "Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps"
    inference.define(library, f"{OP}({tensors}) -> Tensor", _add_layer_norm, _add_layer_norm_fake)
    inference.define(
        library,
        f"{QUANTIZE_OP}({tensors}, Tensor? input_scale=None) -> (Tensor, Tensor, Tensor)",
        _add_layer_norm_quantize,
        _add_layer_norm_quantize_fake,
    )


def check_norm(op: str, rows: Tensor, name: str, weight: Tensor, bias: Tensor, eps: float) -> None:
    """``ValueError`` or ``TypeError`` unless ``weight``, ``bias`` and ``eps`` can normalize ``rows (..., features)``,
    which the message calls ``name``."""
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dim() != 1 or tensor.shape[0] != rows.shape[-1]:
            raise ValueError(f"{op}: {label} has shape {tuple(tensor.shape)}, expected ({rows.shape[-1]},) as {name}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {label} is {tensor.dtype}, expected a floating-point tensor of 16, 32 or 64 bits")
        if tensor.device != rows.device:
            raise ValueError(f"{op}: {label} is on {tensor.device}, expected {rows.device} as {name}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}, expected a number of at least 0")


def _check(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> None:
    if x.dim() < 1:
        raise ValueError(f"{op}: x has 0 dimensions, expected at least 1 (..., features)")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x is {x.dtype}, expected a floating-point tensor of 16, 32 or 64 bits")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)} as x")
        if residual.dtype != x.dtype:
            raise TypeError(f"{op}: residual is {residual.dtype}, expected {x.dtype} as x")
        if residual.device != x.device:
            raise ValueError(f"{op}: residual is on {residual.device}, expected {x.device} as x")
    check_norm(op, x, "x", weight, bias, eps)


def _add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    _check(OP, x, residual, weight, bias, eps)
    problem = select.problem_of(RowsSpec(OP, x.shape[-1]), NEUTRAL, x, "none")
    return select.choose_between(problem).candidate.run(x, residual, weight, bias, eps)


def _add_layer_norm_fake(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    _check(OP, x, residual, weight, bias, eps)
    return x.new_empty(x.shape)


def _add_layer_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, input_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(QUANTIZE_OP, x, residual, weight, bias, eps)
    if input_scale is not None:
        check_scale(QUANTIZE_OP, "input_scale", input_scale, (), x.device)
    problem = select.problem_of(RowsSpec(QUANTIZE_OP, x.shape[-1]), NEUTRAL, x, "none")
    return select.choose_between(problem).candidate.run(x, residual, weight, bias, eps, input_scale)


def _add_layer_norm_quantize_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, input_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(QUANTIZE_OP, x, residual, weight, bias, eps)
    if input_scale is not None:
        check_scale(QUANTIZE_OP, "input_scale", input_scale, (), x.device)
    q = x.new_empty(x.shape, dtype=torch.int8)
    return x.new_empty(x.shape), q, x.new_empty(x.shape[:-1], dtype=torch.float32)


def normalize(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """torch's LayerNorm of ``z (..., features)`` over its last dimension, in its dtype, whatever that of the others."""
    return F.layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps)


def widened(tensor: Tensor) -> Tensor:
    """In fp32 where it has 16 bits, else as it is."""
    return tensor.float() if tensor.dtype.itemsize == 2 else tensor


def _reference(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    z = widened(x) if residual is None else widened(x) + widened(residual)
    return normalize(z, weight, bias, eps).to(x.dtype)


def _reference_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, input_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    y = _reference(x, residual, weight, bias, eps)
    return y, *int8.quantize_rows(y, input_scale)


for _op, _run in ((OP, _reference), (QUANTIZE_OP, _reference_quantize)):
    select.add_candidate(Candidate(_op, NEUTRAL, "reference", "by torch's own ops", reference.always, _run))
