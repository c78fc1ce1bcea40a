"""One packed layer in the place of several that read the same x, such as query, key and value: their outputs one after
the other, in one product; and these layers again.

Both ways go through the neutral tensors alone, so that every weight comes back to the bit. Factors stay factors: a
stack of low-rank layers has those of each (``formats.low_rank``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsebert.nn.packed_linear import PackedLinear


def stack_refusal(parts: Sequence[PackedLinear]) -> str | None:
    """None, or why ``stack`` refuses ``parts``: the first thing in which they do not fit together."""
    if len(parts) < 2:
        return f"found {len(parts)} layer{'' if parts else 's'}, expected two or more"
    first = parts[0]
    for place, part in enumerate(parts):
        if not isinstance(part, PackedLinear):
            return f"part {place} is a {type(part).__name__}, expected a packed layer"
        if part.device.type == "meta":
            return f"part {place} is on meta, expected a layer with its weight"
        if part.kept_rows is not None:
            return (
                f"part {place} has kept_rows, {part.out_features} of {part.dense_out_features}, expected a layer with "
                f"all of its outputs"
            )
    for place, part in enumerate(parts[1:], 1):
        for name, found, expected in (
            ("is a", type(part).__name__, type(first).__name__),
            ("is in", part.dtype, first.dtype),
            ("is on", part.device, first.device),
            ("has in_features", part.dense_in_features, first.dense_in_features),
            ("has columns", _count(part.columns), _count(first.columns)),
            ("has compact_input", part.compact_input, first.compact_input),
            ("has activation", part.activation, first.activation),
            ("has bias", part.bias is not None, first.bias is not None),
            *_patterns(part, first),
        ):
            if found != expected:
                return f"part {place} {name} {found}, expected {expected} as part 0"
        if first.columns is not None and part.columns is not None and not torch.equal(part.columns, first.columns):
            return f"part {place} has other columns than part 0, expected the same"
    return type(first)._stack_refusal(parts)


@torch.no_grad()
def stack(parts: Sequence[PackedLinear]) -> PackedLinear:
    """A module of the class of ``parts`` whose output is that of each, one after the other; ``split`` is the inverse.

    Its tensors are new, a bias is one new Parameter, and it is prepared as the parts were asked to be, ``auto`` where
    they differ or where the device cannot hold the stack so. The parts are left as they were. ``ValueError`` with the
    reason of ``stack_refusal`` where there is one.
    """
    if reason := stack_refusal(parts):
        raise ValueError(f"stack: {reason}")
    first = parts[0]
    spec, tensors = type(first)._stack([part.spec for part in parts], [part.neutral() for part in parts])
    biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
    bias = nn.Parameter(torch.cat(biases), any(one.requires_grad for one in biases)) if biases else None
    asked = {part.requested_layout for part in parts}
    return _prepared(first._like(spec, tensors, bias), asked.pop() if len(asked) == 1 else "auto")


@torch.no_grad()
def split(module: PackedLinear, counts: int | Sequence[int]) -> list[PackedLinear]:
    """Modules of the class of ``module`` with the next ``counts`` of its outputs each, or with equal parts of them
    where ``counts`` is a number: the inverse of ``stack``.

    Their tensors and biases are new, and each is prepared as ``module`` was asked to be, ``auto`` where the device
    cannot hold it so. The module is left as it was. ``ValueError`` where the counts do not add up to its outputs, where
    they part what cannot be parted (a product of factors), and where outputs were dropped.
    """
    label, out_features = f"split: {type(module).__name__}", module.out_features
    if isinstance(counts, int):
        if counts < 1 or out_features % counts:
            raise ValueError(f"{label} has out_features {out_features}, expected a multiple of {counts} parts")
        counts = [out_features // counts] * counts
    counts = list(counts)
    if sum(counts) != out_features or min(counts, default=0) < 1:
        raise ValueError(f"{label} has out_features {out_features}, expected {counts} to be above 0 and add up to that")
    if module.device.type == "meta":
        raise ValueError(f"{label} is on meta, expected a layer with its weight")
    if module.kept_rows is not None:
        raise ValueError(
            f"{label} has kept_rows, {out_features} of {module.dense_out_features}, expected all of its outputs"
        )
    found = type(module)._split(module.spec, module.neutral(), counts)
    biases: list[nn.Parameter | None] = [None] * len(counts)
    if module.bias is not None:
        trains = module.bias.requires_grad
        biases = [nn.Parameter(bias.clone(), trains) for bias in module.bias.split(counts)]
    parts = (module._like(*one, bias) for one, bias in zip(found, biases, strict=True))
    return [_prepared(part, module.requested_layout) for part in parts]


def _patterns(part: PackedLinear, first: PackedLinear) -> list[tuple[str, object, object]]:
    """What the specs say, but for what parts may differ in."""
    names = (name for name in first.spec._fields if name not in first.may_differ)
    return [(f"has {name}", getattr(part.spec, name, None), getattr(first.spec, name)) for name in names]


def _count(columns: Tensor | None) -> str:
    return "none" if columns is None else str(len(columns))


def _prepared(module: PackedLinear, layout: str) -> PackedLinear:
    return module.prepare_("auto" if module.layout_refusal(layout) else layout)
