"""The one shape of every op of the package: ``y = activation(x Wᵀ + b)`` with W held in one of its layouts.

``op(Tensor x, Tensor[] weight, Tensor? bias, Tensor? columns=None, *, str layout, <the spec's fields>, str
activation="none") -> Tensor``

- ``x (..., in_features)`` in any floating dtype of the format, contiguous or not, possibly empty;
- ``weight``: the tensors of ``layout`` (``ops.layouts``), those of dtype COMPUTE in x's dtype;
- ``bias (out_features)`` in x's dtype, or None;
- ``columns int32 (in_features)``: x is ``(..., wider)``, and these columns of it are taken, strictly ascending and in
  range, which is trusted. A kernel that can takes them as it reads x; for the others they are gathered before;
- result ``(..., out_features)``, contiguous, in x's dtype.

Beside each op stands ``<op>_unpack``, the dense weight of a held layout.

Gradients flow to x and bias: dL/dx = dL/dy W, dL/db = sum dL/dy. Packed weights have none (asking for one is an
error), and neither has a fused activation, whose derivative needs the pre-activation: a module under grad applies it
outside the op.

Autocast: x, bias and the COMPUTE tensors of a castable layout are cast to the autocast dtype, as for
``torch.nn.functional.linear``. A kernel's own layout cannot be cast: x and bias are cast to its dtype instead.
float64 is left alone, as everywhere in autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import layouts, select
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.layouts import COMPUTE, DENSE, FLOAT
from sparsebert.ops.specs import Spec

_SCHEMA_TYPES = {"int": "int", "str": "str"}

# The ops as they are called fastest: by their names in torch.ops each call would look for the overload anew.
OVERLOADS: dict[str, torch._ops.OpOverload] = {}


def define(library: torch.library.Library, op: str, spec_type: type[Spec]) -> None:
    """Defines ``op`` for weights of ``spec_type`` and its unpack op, with fakes, gradients and autocast rules."""
    fields = schema_fields(spec_type)
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(
        f"{op}(Tensor x, Tensor[] weight, Tensor? bias, Tensor? columns=None, *, str layout, {fields}, "
        "str activation='none') -> Tensor",
        tags=tags,
    )
    library.define(f"{op}_unpack(Tensor[] weight, *, str layout, {fields}, ScalarType dtype) -> Tensor", tags=tags)

    def run(
        x: Tensor,
        weight: list[Tensor],
        bias: Tensor | None,
        columns: Tensor | None = None,
        *,
        layout: str,
        activation: str = "none",
        **sizes: Any,
    ) -> Tensor:
        spec = spec_type(**sizes)
        check(x, weight, bias, layout, spec, activation, columns=columns)
        problem = select.problem_of(spec, layout, x, activation)
        y = select.choose(problem).run(x, weight, bias, problem, columns)
        return y if y.is_contiguous() else y.contiguous()

    def fake(
        x: Tensor,
        weight: list[Tensor],
        bias: Tensor | None,
        columns: Tensor | None = None,
        *,
        layout: str,
        activation: str = "none",
        **sizes: Any,
    ) -> Tensor:
        spec = spec_type(**sizes)
        check(x, weight, bias, layout, spec, activation, columns=columns)
        return x.new_empty((*x.shape[:-1], spec.out_features))

    def unpack(weight: list[Tensor], *, layout: str, dtype: torch.dtype, **sizes: Any) -> Tensor:
        return layouts.get(op, layout).to_dense(weight, spec_type(**sizes), dtype)

    def unpack_fake(weight: list[Tensor], *, layout: str, dtype: torch.dtype, **sizes: Any) -> Tensor:
        spec = spec_type(**sizes)
        compute = _compute_tensors(weight, spec, layout)
        shape = (spec.out_features, spec.in_features)
        return weight[0].new_empty(shape, dtype=compute[0][1].dtype if compute else dtype)

    library.impl(op, run, "CompositeExplicitAutograd")
    library.impl(f"{op}_unpack", unpack, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsebert::{op}", fake, lib=library)
    torch.library.register_fake(f"sparsebert::{op}_unpack", unpack_fake, lib=library)
    torch.library.register_autograd(f"sparsebert::{op}", _backward, setup_context=_setup_context(op), lib=library)
    for device_type in ("cpu", "cuda"):
        library.impl(op, _autocast(op, spec_type, device_type), f"Autocast{device_type.upper()}")
    OVERLOADS[op] = getattr(torch.ops.sparsebert, op).default


def check(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    layout: str,
    spec: Spec,
    activation: str,
    *,
    columns: Tensor | None = None,
    op: str | None = None,
    x_name: str = "x",
    quantized: bool = False,
) -> None:
    """``ValueError`` or ``TypeError`` naming op, tensor, expected and actual where a call's tensors do not fit.

    ``op`` and ``x_name``: what they are called where that is not ``spec.op`` and ``x``. ``quantized``: x is int8, and
    the other tensors may be in any float dtype.
    """
    # Plain conditions: this runs on every call, and sizes of weights are never symbolic.
    op = op or spec.op
    layouts.get(spec.op, layout)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if columns is not None:
        check_columns(op, columns, spec.in_features, x)
    elif x.dim() < 1 or x.shape[-1] != spec.in_features:
        raise ValueError(f"{op}: {x_name} has shape {tuple(x.shape)}, expected (..., {spec.in_features})")
    if quantized:
        if x.dtype != torch.int8:
            raise TypeError(f"{op}: {x_name} is {x.dtype}, expected torch.int8, symmetric: without a zero point")
    elif not x.is_floating_point():
        raise TypeError(f"{op}: {x_name} is {x.dtype}, expected a floating-point tensor")
    expected = layouts.tensors(spec, layout)
    if len(weight) != len(expected):
        raise ValueError(
            f"{op}: weight has {len(weight)} tensors, expected {len(expected)} ({', '.join(expected)}) "
            f"for layout {layout!r}"
        )
    dtype, device = x.dtype, weight[0].device
    for tensor, (name, held) in zip(weight, expected.items(), strict=True):
        if held.shape is not None and tuple(tensor.shape) != held.shape:
            raise ValueError(
                f"{op}: weight_{name} has shape {tuple(tensor.shape)}, expected {held.shape} for "
                f"in_features={spec.in_features} at {spec.label}"
            )
        if held.dtype == COMPUTE and not quantized:
            if tensor.dtype != dtype:
                raise TypeError(f"{op}: x is {dtype}, expected {tensor.dtype} as weight_{name}")
        elif held.dtype in (COMPUTE, FLOAT):
            if not tensor.is_floating_point():
                raise TypeError(f"{op}: weight_{name} is {tensor.dtype}, expected a floating-point tensor")
        elif tensor.dtype != held.dtype:
            raise TypeError(f"{op}: weight_{name} is {tensor.dtype}, expected {held.dtype}")
        if tensor.device != device:
            raise ValueError(f"{op}: weight_{name} is on {tensor.device}, expected {device} as the others")
    if x.device != device:
        raise ValueError(f"{op}: {x_name} is on {x.device}, expected {device} as weight_{next(iter(expected))}")
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != spec.out_features:
            raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected ({spec.out_features},)")
        if not (bias.is_floating_point() if quantized else bias.dtype == dtype):
            expected_dtype = "a floating-point tensor" if quantized else f"{dtype} as {x_name}"
            raise TypeError(f"{op}: bias is {bias.dtype}, expected {expected_dtype}")
        if bias.device != device:
            raise ValueError(f"{op}: bias is on {bias.device}, expected {device} as {x_name}")


def check_columns(op: str, columns: Tensor, in_features: int, x: Tensor) -> None:
    """``ValueError`` or ``TypeError`` where ``columns`` cannot be columns of x; which they are is not looked at."""
    if columns.dim() != 1 or columns.shape[0] != in_features:
        raise ValueError(f"{op}: columns has shape {tuple(columns.shape)}, expected ({in_features},)")
    if columns.dtype != torch.int32:
        raise TypeError(f"{op}: columns is {columns.dtype}, expected torch.int32")
    if columns.device != x.device:
        raise ValueError(f"{op}: columns is on {columns.device}, expected {x.device} as x")
    if x.dim() < 1 or x.shape[-1] < in_features:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., {in_features} or more), to take columns")


def schema_fields(spec_type: type[Spec]) -> str:
    """The fields of a spec as keyword arguments in the schema of an op."""
    defaults = {name: f"={default}" for name, default in spec_type._field_defaults.items()}
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}{defaults.get(name, '')}" for name, kind in _fields(spec_type))


def _fields(spec_type: type[Spec]) -> list[tuple[str, str]]:
    """Names of the fields and of their types; the annotations are text there."""
    return [(name, _type_name(spec_type.__annotations__[name])) for name in spec_type._fields]


def _type_name(annotation: Any) -> str:
    return str(getattr(annotation, "__forward_arg__", None) or getattr(annotation, "__name__", annotation))


def _compute_tensors(weight: list[Tensor], spec: Spec, layout: str) -> list[tuple[int, Tensor]]:
    """Index and tensor of those whose dtype is the dtype of x."""
    held = layouts.tensors(spec, layout).values()
    return [(i, t) for i, (t, h) in enumerate(zip(weight, held, strict=True)) if h.dtype == COMPUTE]


def _setup_context(op: str) -> Any:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
        # Inputs that keep their default are left out where a graph is traced.
        x, weight, columns = inputs[0], inputs[1], inputs[3] if len(inputs) > 3 else None
        kwargs = dict(keyword_only_inputs)
        activation = kwargs.pop("activation")
        if activation != "none":
            raise RuntimeError(
                f"{op}: no gradient through the fused activation {activation!r}; apply it outside the op "
                f"(activation='none') where x or bias requires grad"
            )
        if any(tensor.requires_grad for tensor in weight):
            raise RuntimeError(
                f"{op}: weight (layout {kwargs['layout']!r}) requires grad, but packed weights are not trainable; "
                f"train the dense model with a method of sparsebert.methods, or call decompress_ first"
            )
        ctx.save_for_backward(columns, *weight)
        ctx.op, ctx.weight_kwargs, ctx.x_features = op, kwargs, x.shape[-1]

    return setup_context


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    columns, *weight = ctx.saved_tensors
    needs_x, _, needs_bias, *others = ctx.needs_input_grad
    grad_x = grad_bias = None
    if needs_x:
        # An op may not return one of its inputs, so the dense layout is used as it is.
        if ctx.weight_kwargs["layout"] == DENSE:
            dense = weight[0]
        else:
            dense = getattr(torch.ops.sparsebert, f"{ctx.op}_unpack")(weight, **ctx.weight_kwargs, dtype=grad.dtype)
        grad_x = grad @ dense
        if columns is not None:
            grad_x = grad_x.new_zeros((*grad_x.shape[:-1], ctx.x_features)).index_copy(-1, columns.long(), grad_x)
    if needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, [None] * len(weight), grad_bias, *(None for _ in others)


def _autocast(op: str, spec_type: type[Spec], device_type: str) -> Any:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def cast_and_run(
        x: Tensor,
        weight: list[Tensor],
        bias: Tensor | None,
        columns: Tensor | None = None,
        *,
        layout: str,
        activation: str = "none",
        **sizes: Any,
    ) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            if x.dtype != torch.float64:
                dtype = torch.get_autocast_dtype(device_type)
                weight = list(weight)
                for i, tensor in _compute_tensors(weight, spec_type(**sizes), layout):
                    if layouts.get(op, layout).castable:
                        weight[i] = tensor.to(dtype)
                    else:
                        dtype = tensor.dtype
                x = x.to(dtype)
                bias = None if bias is None else bias.to(dtype)
            run = getattr(torch.ops.sparsebert, op)
            return run(x, weight, bias, columns, layout=layout, activation=activation, **sizes)

    return cast_and_run
