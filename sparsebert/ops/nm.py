"""``sparsebert::nm_linear``: y = activation(x Wᵀ + b) with W in one of the layouts of an n:m weight.

Schema, checks, fake, gradients and autocast of the op; the kernels behind it are candidates of ``ops.select``.

- ``x (..., in_features)`` in any floating dtype of the format, contiguous or not, possibly empty;
- ``weight``: the tensors of ``layout`` (``ops.layouts``), in x's dtype; ``bias (out_features)`` in x's dtype or None;
- result ``(..., out_features)``, contiguous, in x's dtype.

Gradients flow to x and bias. Packed weights have none (asking for one is an error), and neither has a fused
activation, whose derivative needs the pre-activation: a module under grad applies it outside the op.

Autocast: x, bias and the weights of the layouts ``neutral`` and ``dense`` are cast to the autocast dtype, as for
``torch.nn.functional.linear``. A kernel's own layout cannot be cast: x and bias are cast to its dtype instead.
float64 is left alone, as everywhere in autocast.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import layouts, select
from sparsebert.ops.activations import ACTIVATIONS

SCHEMA = (
    "nm_linear(Tensor x, Tensor[] weight, Tensor? bias, *, str layout, int n, int m, int in_features, "
    'int out_features, str activation="none") -> Tensor'
)
UNPACK_SCHEMA = "nm_unpack(Tensor[] weight, *, str layout, int n, int m, int in_features, int out_features) -> Tensor"


def nm_linear(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    *,
    layout: str,
    n: int,
    m: int,
    in_features: int,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """y = activation(x Wᵀ + b); see the module's docstring for shapes, dtypes, gradients and autocast.

    ``ValueError`` or ``TypeError`` where a tensor does not fit; ``RuntimeError`` where no backend serves the call.
    """
    return torch.ops.sparsebert.nm_linear(
        x,
        weight,
        bias,
        layout=layout,
        n=n,
        m=m,
        in_features=in_features,
        out_features=out_features,
        activation=activation,
    )


def _check(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    layout: str,
    n: int,
    m: int,
    in_features: int,
    out_features: int,
    activation: str,
) -> None:
    # Plain conditions: this runs on every call, and sizes of weights are never symbolic.
    held = layouts.get(layout)
    if activation not in ACTIVATIONS:
        raise ValueError(f"nm_linear: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"nm_linear: x has shape {tuple(x.shape)}, expected (..., {in_features})")
    held.check(weight, layouts.Spec(n, m, in_features, out_features))
    first = weight[0]
    dtype, device = first.dtype, first.device
    if x.dtype != dtype:
        raise TypeError(f"nm_linear: x is {x.dtype}, expected {dtype} as weight_{held.tensors[0]}")
    if x.device != device:
        raise ValueError(f"nm_linear: x is on {x.device}, expected {device} as weight_{held.tensors[0]}")
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != out_features:
            raise ValueError(f"nm_linear: bias has shape {tuple(bias.shape)}, expected ({out_features},)")
        if bias.dtype != dtype:
            raise TypeError(f"nm_linear: bias is {bias.dtype}, expected {dtype} as x")
        if bias.device != device:
            raise ValueError(f"nm_linear: bias is on {bias.device}, expected {device} as x")


def _run(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    *,
    layout: str,
    n: int,
    m: int,
    in_features: int,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    _check(x, weight, bias, layout, n, m, in_features, out_features, activation)
    problem = select.Problem(
        "nm_linear",
        layout,
        x.device.type,
        select.capability(x.device),
        x.dtype,
        n,
        m,
        in_features,
        out_features,
        x.numel() // in_features,
        activation,
    )
    y = select.choose(problem).run(x, weight, bias, problem)
    return y if y.is_contiguous() else y.contiguous()


def _fake(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    *,
    layout: str,
    n: int,
    m: int,
    in_features: int,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    _check(x, weight, bias, layout, n, m, in_features, out_features, activation)
    return x.new_empty((*x.shape[:-1], out_features))


def _unpack(weight: list[Tensor], *, layout: str, n: int, m: int, in_features: int, out_features: int) -> Tensor:
    return layouts.get(layout).to_dense(weight, layouts.Spec(n, m, in_features, out_features))


def _unpack_fake(weight: list[Tensor], *, layout: str, n: int, m: int, in_features: int, out_features: int) -> Tensor:
    return weight[0].new_empty((out_features, in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    _x, weight, _bias = inputs
    kwargs = dict(keyword_only_inputs)
    activation = kwargs.pop("activation")
    if activation != "none":
        raise RuntimeError(
            f"nm_linear: no gradient through the fused activation {activation!r}; apply it outside the op "
            f"(activation='none') where x or bias requires grad"
        )
    if any(tensor.requires_grad for tensor in weight):
        raise RuntimeError(
            f"nm_linear: weight (layout {kwargs['layout']!r}) requires grad, but packed weights are not trainable; "
            f"train the dense model with a method of sparsebert.methods, or call decompress_ first"
        )
    ctx.save_for_backward(*weight)
    ctx.weight_kwargs = kwargs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list[None], Tensor | None]:
    weight = list(ctx.saved_tensors)
    needs_x, _, needs_bias = ctx.needs_input_grad
    grad_x = grad_bias = None
    if needs_x:
        # An op may not return one of its inputs, so the dense layout is used as it is.
        if ctx.weight_kwargs["layout"] == "dense":
            dense = weight[0]
        else:
            dense = torch.ops.sparsebert.nm_unpack(weight, **ctx.weight_kwargs)
        grad_x = grad @ dense
    if needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, [None] * len(weight), grad_bias


def _autocast(device_type: str) -> Any:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def cast_and_run(x: Tensor, weight: list[Tensor], bias: Tensor | None, *, layout: str, **kwargs: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            dtype = torch.get_autocast_dtype(device_type)
            if not layouts.get(layout).castable:
                dtype = weight[0].dtype
            if x.dtype != torch.float64:
                x = x.to(dtype)
                weight = [w.to(dtype) if w.is_floating_point() else w for w in weight]
                bias = None if bias is None else bias.to(dtype)
            return torch.ops.sparsebert.nm_linear(x, weight, bias, layout=layout, **kwargs)

    return cast_and_run


@cache
def register() -> torch.library.Library:
    """Defines the ops with their fakes, gradients, autocast rules and built-in candidates; once a process."""
    library = torch.library.Library("sparsebert", "DEF")
    library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.define(UNPACK_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("nm_linear", _run, "CompositeExplicitAutograd")
    library.impl("nm_unpack", _unpack, "CompositeExplicitAutograd")
    torch.library.register_fake("sparsebert::nm_linear", _fake, lib=library)
    torch.library.register_fake("sparsebert::nm_unpack", _unpack_fake, lib=library)
    torch.library.register_autograd("sparsebert::nm_linear", _backward, setup_context=_setup_context, lib=library)
    for device_type in ("cpu", "cuda"):
        library.impl("nm_linear", _autocast(device_type), f"Autocast{device_type.upper()}")

    from sparsebert.ops import reference, torch_sparse

    for candidate in (*reference.CANDIDATES, *torch_sparse.CANDIDATES):
        select.add_candidate(candidate)
    # The library lives as long as this reference to it: the cache of this function keeps it.
    return library
