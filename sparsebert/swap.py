"""Plan in, modules out: ``compress_`` and ``decompress_`` edit a model in place, all of it or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sparsebert.configs import NMConfig
from sparsebert.formats import nm
from sparsebert.nn import NMLinear
from sparsebert.plan import CompressionPlan, Selection, refusal, select
from sparsebert.report import CompressedLayer, Report, packed_layers, role_of, size_report

QUANT_METHOD = "sparsebert"
FORMAT_VERSION = 1


@torch.no_grad()
def compress_(
    model: nn.Module,
    spec: Selection | CompressionPlan,
    *,
    ignore: Iterable[str] = (),
    layout: str = "auto",
) -> Report:
    """Packs linear layers of ``model`` in place and returns a ``Report``; prints nothing.

    ``spec`` is one of

    - a config: every encoder linear of a known family is pruned by magnitude, one-shot, and packed;
    - a mapping from role, path or glob pattern to config or None (see ``sparsebert.plan.select``), pruned likewise;
    - a ``CompressionPlan``: its layers are verified and packed as they are.

    ``ignore``: paths or patterns left dense (not with a plan). ``layout``: how packed weights are held (``auto``,
    ``neutral``, ``dense`` ...). Layers that do not qualify stay dense and are listed with the reason. ``ValueError``
    where nothing is left to pack, a pattern matches nothing, a plan does not hold or a weight holds NaN; the model is
    then as it was.
    """
    skipped: dict[str, str] = {}
    if isinstance(spec, CompressionPlan):
        if tuple(ignore):
            raise ValueError("compress_: ignore cannot be combined with a plan; remove the layers from the plan")
        spec.verify(model)
        chosen = dict(spec.layers)
        prune = False
        if not chosen:
            raise ValueError("compress_: the plan is empty")
    else:
        chosen, skipped = select(model, spec, ignore=ignore)
        prune = True

    packed: dict[str, NMLinear] = {}
    energy: dict[str, float] = {}
    for path, config in chosen.items():
        linear = model.get_submodule(path)
        packed[path], energy[path] = _pack(linear, config, path, prune)  # type: ignore[arg-type]
        packed[path].prepare_(layout)

    swap_in_(model, packed)
    _write_config(model)
    places = role_of(model)
    layers = []
    for path, module in packed.items():
        role, index = places.get(path, (None, None))
        layers.append(CompressedLayer(path, role, index, str(module.config), module.layout, energy[path]))
    return Report(tuple(layers), skipped, size_report(model))


@torch.no_grad()
def decompress_(model: nn.Module) -> nn.Module:
    """Turns every packed layer back into an ``nn.Linear`` (dropped weights are zeros) and clears all trace of it from
    the model and its config. In place; returns ``model``. ``ValueError`` where nothing is packed."""
    dense = {path: module.to_linear() for path, module in packed_layers(model)}
    swap_in_(model, dense)
    for owner in {id(m): m for m in model.modules() if hasattr(m, "config")}.values():
        for name in ("quantization_config", "_is_quantized"):
            if name in vars(owner.config):
                delattr(owner.config, name)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    return model


def prepare_(model: nn.Module, layout: str = "auto") -> nn.Module:
    """Holds every packed layer in ``layout`` (see ``NMLinear.prepare_``). In place; returns ``model``.

    ``ValueError`` where a layer cannot be held so; no layer is changed then.
    """
    layers = packed_layers(model)
    for path, module in layers:
        if reason := module.layout_refusal(layout):
            raise ValueError(f"{path}: layout {layout!r} is not possible: {reason}")
    for _, module in layers:
        module.prepare_(layout)
    return model


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The layer map that a checkpoint's config.json carries: every tensor shape follows from it."""
    places = role_of(model)
    layers = {}
    for path, module in packed_layers(model):
        role, index = places.get(path, (None, None))
        layers[path] = {"role": role, "index": index, **module.layer_entry()}
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "layers": layers}


def swap_in_(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts each module in the place of the one at its path, wherever else that one is referred to as well."""
    new_by_old = {id(model.get_submodule(path)): new for path, new in modules.items()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new_by_old:
                parent._modules[name] = new_by_old[id(child)]


def _pack(linear: nn.Linear, config: NMConfig, path: str, prune: bool) -> tuple[NMLinear, float]:
    if reason := refusal(linear, config):
        raise ValueError(f"{path}: {reason}")
    if not prune:
        return NMLinear.from_linear(linear, config, name=path), 1.0
    weight = linear.weight.detach()
    # A view of the layer with the pruned weight: the model's own layer must stay as it is until all are packed.
    pruned = copy.copy(linear)
    pruned._parameters = dict(linear._parameters)
    pruned._parameters["weight"] = nn.Parameter(nm.project(weight, config.n, config.m), requires_grad=False)
    before = float(weight.float().square().sum())
    after = float(pruned.weight.float().square().sum())
    return NMLinear.from_linear(pruned, config, name=path), after / before if before else 1.0


def _write_config(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if config is not None:
        config.quantization_config = quantization_config(model)
