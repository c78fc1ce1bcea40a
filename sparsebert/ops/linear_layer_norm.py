"""A linear layer, the residual connection after it and LayerNorm, as one op, so that one kernel may do all of it.

For each op of ``ops.specs.SPECS``, called by ``linear_add_layer_norm``:

- ``<op>_add_layer_norm(x, x_scale, weight, bias, residual, norm_weight, norm_bias, eps, ...) -> y``:
  y = LayerNorm(x Wᵀ + b + residual), as ``ops.layer_norm`` has it, ``(..., out_features)`` in the residual's dtype;
- ``<op>_add_layer_norm_quantize(..., output_scale=None) -> (y, q, s)``: the same y, and ``quantize_rows(y,
  output_scale)`` of it as it is stored.

W is held in a layout of the op. ``x (..., in_features)`` is in the residual's dtype; of ``int8_linear`` it is int8 rows
with their scales ``x_scale fp32 (...)``, as ``quantize_rows`` gives them.

A kernel that does all of it is a candidate of the new op. It runs where it is forced, or where ``sb.tune`` measured
that it is quicker than two; else the linear's own kernel runs, then that of ``add_layer_norm``, and what is normalized
was rounded in between. No gradients and no autocast rule, as for ``add_layer_norm``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsebert.formats.common import DTYPES
from sparsebert.ops import dense, inference, linear, select
from sparsebert.ops.layer_norm import add_layer_norm, add_layer_norm_quantize, check_norm
from sparsebert.ops.quantized import check_scale
from sparsebert.ops.select import Problem, Solution
from sparsebert.ops.specs import SPECS, AddLayerNormSpec, Int8Spec, Spec, add_layer_norm_op

# What measurements call the two kernels, in the place of a backend.
APART = "apart"
# y, and where it is quantized too its rows and their scales.
Result = tuple[Tensor, Tensor | None, Tensor | None]


class Call(NamedTuple):
    """The tensors of a call. ``residual (tokens, out)`` and ``x (tokens, in)``, rows in memory as they may be."""

    x: Tensor
    x_scale: Tensor | None
    weight: list[Tensor]
    bias: Tensor | None
    residual: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    output_scale: Tensor | None = None


def linear_add_layer_norm(call: Call, spec: Spec, layout: str, *, quantize: bool) -> Result:
    """By the op of ``spec``. ``ValueError`` or ``TypeError`` naming op and tensor where one does not fit,
    ``RuntimeError`` where a gradient is asked for or no backend serves the linear."""
    whole = AddLayerNormSpec(spec, quantize)
    run = getattr(torch.ops.sparsebert, whole.op)
    *given, output_scale = call
    if not quantize:
        return run(*given, layout=layout, **spec._asdict()), None, None
    return run(*given, output_scale, layout=layout, **spec._asdict())  # type: ignore[no-any-return]


def fusable(spec: Spec, layout: str, residual: Tensor, *, quantize: bool) -> bool:
    """Whether a kernel that does all of it could run at some count of tokens. While torch.compile traces, True of any
    CUDA tensor: the op decides when it runs."""
    if torch.compiler.is_compiling() or not residual.is_cuda:
        return residual.is_cuda
    return bool(candidates(problem_of(spec, layout, residual, quantize=quantize)))


def problem_of(spec: Spec, layout: str, residual: Tensor, *, quantize: bool) -> Problem:
    """The problem of a call that adds ``residual``."""
    return select.problem_of(AddLayerNormSpec(spec, quantize), layout, residual, "none")


def candidates(problem: Problem) -> list[select.Candidate]:
    """Those that serve ``problem`` by one kernel, of the forced backend where one is."""
    forced = select.forced_backend()
    return [c for c, reason in select.review(problem) if reason is None and forced in (None, c.backend)]


def run_apart(call: Call, problem: Problem) -> Result:
    """By the linear's own kernel, and that of ``add_layer_norm``."""
    spec = problem.spec.linear
    inner = problem._replace(spec=spec)
    # A layer that was left dense is torch's own whatever is forced.
    solution = select.choose(inner, force=spec.op != dense.OP)
    if call.x_scale is None:
        y = solution.run(call.x, call.weight, call.bias, inner)
    else:
        kernels: Any = solution.candidate.run
        y = kernels.multiply(call.x, call.x_scale, call.weight, call.bias, inner, **solution.options)
    norm = (call.norm_weight, call.norm_bias, call.eps)
    if problem.spec.quantize:
        return add_layer_norm_quantize(y, call.residual, *norm, call.output_scale)
    return add_layer_norm(y, call.residual, *norm), None, None


def run_fused(solution: Solution, call: Call, problem: Problem) -> Result:
    """By one kernel."""
    found: Result = solution.candidate.run(call, problem, **solution.options)
    return found


def define(library: torch.library.Library) -> None:
    """Defines both ops of every spec, with their fakes."""
    for op, spec_type in SPECS.items():
        for quantize in (False, True):
            _define(library, add_layer_norm_op(op, quantize=quantize), spec_type, quantize)


def _define(library: torch.library.Library, op: str, spec_type: type[Spec], quantize: bool) -> None:
    def checked(*given: Any, layout: str, **sizes: Any) -> tuple[Call, AddLayerNormSpec]:
        call, spec = Call(*given), AddLayerNormSpec(spec_type(**sizes), quantize)
        _check(call, spec, layout)
        return call, spec

    def run(*given: Any, layout: str, **sizes: Any) -> Any:
        call, spec = checked(*given, layout=layout, **sizes)
        shape = call.residual.shape
        problem = problem_of(spec.linear, layout, call.residual, quantize=quantize)
        solution = select.fused(problem)
        rows = _as_rows(call)
        y, q, s = run_apart(rows, problem) if solution is None else run_fused(solution, rows, problem)
        if q is None or s is None:
            return y.view(shape)
        return y.view(shape), q.view(shape), s.view(shape[:-1])

    def fake(*given: Any, layout: str, **sizes: Any) -> Any:
        residual = checked(*given, layout=layout, **sizes)[0].residual
        y = residual.new_empty(residual.shape)
        if not quantize:
            return y
        s = residual.new_empty(residual.shape[:-1], dtype=torch.float32)
        return y, residual.new_empty(residual.shape, dtype=torch.int8), s

    tensors = (
        "Tensor x, Tensor? x_scale, Tensor[] weight, Tensor? bias, Tensor residual, Tensor norm_weight, "
        "Tensor norm_bias, float eps"
    )
    result = "Tensor"
    if quantize:
        tensors, result = f"{tensors}, Tensor? output_scale=None", "(Tensor, Tensor, Tensor)"
    fields = f"str layout, {linear.schema_fields(spec_type)}"
    inference.define(library, f"{op}({tensors}, *, {fields}) -> {result}", run, fake)


def _check(call: Call, spec: AddLayerNormSpec, layout: str) -> None:
    op, x, x_scale, residual = spec.op, call.x, call.x_scale, call.residual
    integer = isinstance(spec.linear, Int8Spec)
    linear.check(x, call.weight, call.bias, layout, spec.linear, "none", op=op, quantized=integer)
    if integer and x_scale is None:
        raise ValueError(f"{op}: x_scale is None, expected the scales of x, whose rows are int8")
    if x_scale is not None and not integer:
        raise ValueError(f"{op}: x_scale is given, expected None, as the weight is not int8")
    if x_scale is not None:
        check_scale(op, "x_scale", x_scale, x.shape[:-1], x.device)
    if residual.shape != (*x.shape[:-1], spec.out_features):
        expected = (*x.shape[:-1], spec.out_features)
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}, expected {expected} as the result")
    if residual.dtype not in DTYPES if integer else residual.dtype != x.dtype:
        expected_dtype = "a floating-point tensor of 16, 32 or 64 bits" if integer else f"{x.dtype} as x"
        raise TypeError(f"{op}: residual is {residual.dtype}, expected {expected_dtype}")
    if residual.device != x.device:
        raise ValueError(f"{op}: residual is on {residual.device}, expected {x.device} as x")
    check_norm(op, residual, "residual", call.norm_weight, call.norm_bias, call.eps)
    if call.output_scale is not None:
        check_scale(op, "output_scale", call.output_scale, (), x.device)


def _as_rows(call: Call) -> Call:
    """With all tokens in one dimension, and int8 rows as kernels read them."""
    x, residual = (one.reshape(-1, one.shape[-1]) for one in (call.x, call.residual))
    if call.x_scale is None:
        return call._replace(x=x, residual=residual)
    return call._replace(x=x.contiguous(), x_scale=call.x_scale.float().reshape(-1).contiguous(), residual=residual)
