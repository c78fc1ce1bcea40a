"""Ops of the forward pass alone: they have no gradient formula, and say so where one would be needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def define(library: torch.library.Library, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines the op of ``schema`` by ``run``, on any device, and ``fake``.

    Called with gradients enabled and an input that requires one, it raises ``RuntimeError`` with the op's name and that
    of the input, before anything is computed.
    """
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = schema.partition("(")[0]
    library.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsebert::{op}", fake, lib=library)
    library.impl(op, _refuse_gradients(op), "Autograd")


def _refuse_gradients(op: str) -> Callable[..., Any]:
    overload = getattr(torch.ops.sparsebert, op).default
    names = [argument.name for argument in overload._schema.arguments]

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for name, value in (*zip(names, args, strict=False), *kwargs.items()):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"{op}: {name} requires grad, but the op has no gradient; call it under torch.no_grad() or "
                        f"torch.inference_mode(), or torch's own functions in its place where you train"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args, **kwargs)

    return run
