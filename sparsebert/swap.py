"""Plan in, modules out: ``compress_`` and ``decompress_`` edit a model in place, all of it or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.configs import Config, DenseConfig, LowRankConfig, LowRankSparseConfig, NMConfig
from sparsebert.formats import nm, one_shot
from sparsebert.nn import MODULES, PackedLinear
from sparsebert.plan import CompressionPlan, Selection, match_linears, obstacle, refusal, select
from sparsebert.report import CompressedLayer, Report, packed_layers, role_of, size_report
from sparsebert.roles import LayerRef, feed_forward_pairs, refuse_fused

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

    A feed-forward layer that is left dense loses the rows that the layer after it does not read (``DenseConfig``).
    ``ignore``: paths or patterns left as they are (not with a plan). ``layout``: how packed weights are held (``auto``,
    ``neutral``, ``dense`` ...). Layers that do not qualify stay dense and are listed with the reason. ``ValueError``
    where nothing is left to pack, a pattern matches nothing, a plan does not hold or a weight holds NaN; the model is
    then as it was.
    """
    refuse_fused(model, "compress_")
    skipped: dict[str, str] = {}
    factors: Mapping[str, Mapping[str, Tensor]] | None = None
    ignore = tuple(ignore)
    if isinstance(spec, CompressionPlan):
        if ignore:
            raise ValueError("compress_: ignore cannot be combined with a plan; remove the layers from the plan")
        spec.verify(model)
        chosen: dict[str, Config] = dict(spec.layers)
        factors = spec.factors
        if not chosen:
            raise ValueError("compress_: the plan is empty")
    else:
        chosen, skipped = select(model, spec, ignore=ignore)

    packed: dict[str, PackedLinear] = {}
    energy: dict[str, float] = {}
    compacted = _compacted(model, chosen, match_linears(model, ignore, "ignore"), pruned=factors is not None)
    chosen |= {path: DenseConfig() for path in compacted if path not in chosen}
    for path, config in chosen.items():
        linear = model.get_submodule(path)
        made_of = None if factors is None else factors.get(path, {})
        packed[path] = _pack(linear, config, path, made_of, **compacted.get(path, {}))  # type: ignore[arg-type]
        energy[path] = _kept_energy(linear.weight.detach(), packed[path])  # type: ignore[union-attr, operator]
        packed[path].prepare_(layout)

    swap_in_(model, packed)
    _write_config(model)
    places = role_of(model)
    layers = []
    for path, module in packed.items():
        role, index = places.get(path, (None, None))
        text = str(chosen[path])
        layers.append(CompressedLayer(path, role, index, text, module.description, module.layout, energy[path]))
    skipped = {path: reason for path, reason in skipped.items() if path not in packed}
    return Report(tuple(layers), skipped, size_report(model))


@torch.no_grad()
def decompress_(model: nn.Module) -> nn.Module:
    """Turns every packed layer back into an ``nn.Linear`` (dropped weights are zeros) and clears all trace of it from
    the model and its config. In place; returns ``model``. ``ValueError`` where nothing is packed."""
    refuse_fused(model, "decompress_")
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
    """Holds every packed layer in ``layout`` (see ``PackedLinear.prepare_``). In place; returns ``model``.

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


def check_compaction(model: nn.Module) -> None:
    """``ValueError`` naming the layer unless compacted feed-forward nets fit together: where ``output`` takes compact
    input, ``intermediate`` gives exactly those columns, and drops rows nowhere else."""
    loose = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, PackedLinear) and (module.compact_input or module.kept_rows is not None)
    }
    for inner, outer in feed_forward_pairs(model) if loose else []:
        first, second = loose.pop(inner.path, None), loose.pop(outer.path, None)
        if first is None and second is None:
            continue
        dropped = None if first is None else first.kept_rows
        columns = second.columns if second is not None and second.compact_input else None
        if dropped is None or columns is None or not torch.equal(dropped, _inner_rows(columns, inner, outer)):
            raise ValueError(f"{inner.path}: kept_rows are not the columns that {outer.path} is made of")
    for path in loose:
        raise ValueError(f"{path}: is compacted for the layer beside it, but is no part of a feed-forward net")


def swap_in_(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts each module in the place of the one at its path, wherever else that one is referred to as well."""
    new_by_old = {id(model.get_submodule(path)): new for path, new in modules.items()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new_by_old:
                parent._modules[name] = new_by_old[id(child)]


def _compacted(
    model: nn.Module, chosen: Mapping[str, Config], ignored: Iterable[str], *, pruned: bool
) -> dict[str, dict[str, Any]]:
    """How the two layers of each feed-forward net are compacted together: keyword arguments of ``from_linear`` by path.

    Where ``output`` drops input columns, nobody reads those rows of ``intermediate``: they are dropped as well, and
    ``output`` need not gather. An ``intermediate`` that is not in ``chosen`` is packed dense for that, unless it is
    ``ignored`` or cannot be packed.
    """
    found: dict[str, dict[str, Any]] = {}
    if not any(isinstance(config, NMConfig) and config.columns is not None for config in chosen.values()):
        return found
    try:
        pairs = feed_forward_pairs(model)
    except ValueError:
        # A family without roles: x is gathered.
        return found
    for inner, outer in pairs:
        config, inner_config = chosen.get(outer.path), chosen.get(inner.path, DenseConfig())
        if not isinstance(config, NMConfig) or config.columns is None:
            continue
        if inner.path not in chosen and (inner.path in ignored or obstacle(model, inner.path, inner_config)):
            continue
        weight = outer.module.weight.detach()  # type: ignore[union-attr, operator]
        count = nm.column_count(weight.shape[1], config.columns, config.m)
        columns = nm.kept_columns(weight, count, name=outer.path) if pruned else nm.choose_columns(weight, count)
        rows = _inner_rows(columns, inner, outer)
        if len(columns) < weight.shape[1] and not _loses_rank(inner_config, inner, len(rows), pruned=pruned):
            found[inner.path] = {"kept_rows": rows}
            found[outer.path] = {"columns": columns, "compact_input": True}
    return found


def _pack(
    linear: nn.Linear,
    config: Config,
    path: str,
    factors: Mapping[str, Tensor] | None,
    *,
    kept_rows: Tensor | None = None,
    columns: Tensor | None = None,
    compact_input: bool = False,
) -> PackedLinear:
    """``linear`` packed, after one-shot compression where ``factors`` is None."""
    if reason := refusal(linear, config):
        raise ValueError(f"{path}: {reason}")
    if factors is None:
        weight = linear.weight.detach()
        # Rows that are dropped take no part: what a method may spend on a matrix goes to the others.
        rows = torch.arange(weight.shape[0], device=weight.device) if kept_rows is None else kept_rows.long()
        found = one_shot.approximate(weight[rows], config, name=path)
        linear = _with_weight(linear, _in_rows(found.weight, rows, weight.shape[0]))
        factors = {
            name: factor if name == "v" else _in_rows(factor, rows, weight.shape[0])
            for name, factor in found.factors.items()
        }
    return MODULES[config.format].from_linear(
        linear,
        config,
        name=path,
        factors=factors,
        columns=columns,
        kept_rows=kept_rows,
        compact_input=compact_input,
    )


def _inner_rows(columns: Tensor, inner: LayerRef, outer: LayerRef) -> Tensor:
    """The outputs of ``intermediate`` that become these inputs of ``output``; a gated one has two halves of them."""
    width = _dense_shape(outer.module)[1]
    return torch.cat([columns + half * width for half in range(_dense_shape(inner.module)[0] // width)])


def _dense_shape(layer: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear layer, packed or not, before any compaction."""
    if isinstance(layer, PackedLinear):
        return layer.dense_out_features, layer.dense_in_features
    return layer.out_features, layer.in_features  # type: ignore[return-value]


def _loses_rank(config: Config, inner: LayerRef, rows: int, *, pruned: bool) -> bool:
    """Whether so few rows of ``intermediate`` cannot have the rank of its factors; x is gathered then."""
    if not isinstance(config, LowRankConfig | LowRankSparseConfig):
        return False
    out_features, in_features = _dense_shape(inner.module)
    return one_shot.rank_of(config, out_features if pruned else rows, in_features) > min(rows, in_features)


def _in_rows(part: Tensor, rows: Tensor, count: int) -> Tensor:
    """``part`` in the places ``rows`` of ``count`` rows, zeros elsewhere."""
    return part.new_zeros(count, part.shape[1]).index_copy_(0, rows, part)


def _with_weight(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """A view of the layer with another weight: the model's own must stay as it is until all layers are packed."""
    view = copy.copy(linear)
    view._parameters = dict(linear._parameters)
    view._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return view


def _kept_energy(weight: Tensor, packed: PackedLinear) -> float:
    """1 - |W - W'|^2 / |W|^2 (squared Frobenius norms), W' being what ``packed`` holds."""
    total = float(weight.float().square().sum())
    lost = float((weight.float() - packed.to_linear().weight.detach().float()).square().sum())
    return 1 - lost / total if total else 1.0


def _write_config(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if config is not None:
        config.quantization_config = quantization_config(model)
