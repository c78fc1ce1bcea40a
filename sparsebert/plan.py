"""What is to be done to which layer: ``CompressionPlan``, and how a user's selection becomes one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsebert import storage
from sparsebert.configs import (
    CONFIG_TYPES,
    Config,
    Int8Config,
    LowRankConfig,
    LowRankSparseConfig,
    NMConfig,
    config_from_dict,
)
from sparsebert.formats import nm, one_shot
from sparsebert.roles import ROLES, find_layers, linear_paths, refuse_fused, summarize, weight_use

PLAN_VERSION = 1
PLAN_FILE = "plan.json"
FACTORS_FILE = "plan.safetensors"
_FACTORS = ("u", "v", "sparse")
_FLOATS = ("F64", "F32", "F16", "BF16")
_CONFIG_NAMES = ", ".join(kind.__name__ for kind in CONFIG_TYPES)

# What compress_ and the methods take: one config for every encoder linear, or a mapping from role or pattern.
Selection = Config | Mapping[str, Config | None]


@dataclass(frozen=True)
class CompressionPlan:
    """Module path -> config for every layer to pack, and the factors of the layers that are made of factors. A
    method's ``finalize`` returns one.

    A plan makes a promise about weights that are already compressed; ``verify`` proves it before anything is packed.
    ``factors``: path -> ``u (out, rank)``, ``v (rank, in)`` and, for low rank plus sparse, ``sparse (out, in)``, whose
    product and sum are the layer's weight.
    """

    layers: Mapping[str, Config] = field(default_factory=dict)
    factors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def verify(self, model: nn.Module) -> None:
        """``ValueError`` naming the layer and its first bad place unless every layer obeys its config."""
        if stray := sorted(self.factors.keys() - self.layers.keys()):
            raise ValueError(f"{stray[0]}: the plan has factors for this layer, but no config")
        for path, config in self.layers.items():
            try:
                module = model.get_submodule(path)
            except AttributeError:
                raise ValueError(
                    f"{path}: the plan names this layer, but {type(model).__name__} has no such module; "
                    f"its linear layers: {summarize(linear_paths(model))}"
                ) from None
            if reason := obstacle(model, path, config):
                raise ValueError(f"{path}: {reason}")
            weight = module.weight.detach()  # type: ignore[union-attr, operator]
            factors = dict(self.factors.get(path, {}))
            if reason := one_shot.find_violation(weight, config, factors, name=path):
                raise ValueError(f"{path}: {reason}")

    def to_dict(self) -> dict[str, Any]:
        layers = {path: config.to_dict() for path, config in self.layers.items()}
        return {"plan_version": PLAN_VERSION, "layers": layers}

    @classmethod
    def from_dict(cls, data: Any) -> CompressionPlan:
        """Inverse of ``to_dict``, without factors; ``ValueError`` or ``TypeError`` where it is no plan."""
        if not isinstance(data, dict) or not isinstance(data.get("layers"), dict):
            raise ValueError("plan: expected a JSON object with an object 'layers'")
        _check_version(data)
        return cls({path: config_from_dict(entry) for path, entry in data["layers"].items()})

    def save(self, folder: str | Path) -> Path:
        """Writes ``plan.json``, and ``plan.safetensors`` where there are factors, into ``folder``, which must exist."""
        file = Path(folder) / PLAN_FILE
        factors = Path(folder) / FACTORS_FILE
        tensors = {
            f"{path}.{name}": tensor.detach().cpu().contiguous()
            for path, parts in self.factors.items()
            for name, tensor in parts.items()
        }
        if tensors:
            save_file(tensors, factors)
        else:
            # An older plan's factors must not be taken for this one's.
            factors.unlink(missing_ok=True)
        file.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return file

    @classmethod
    def load(cls, folder: str | Path) -> CompressionPlan:
        """What ``save`` wrote, factors on the CPU. Not trusted: ``ValueError`` naming the file where it is not that."""
        file = Path(folder) / PLAN_FILE
        data = storage.read_json(file)
        try:
            plan = cls.from_dict(data)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error
        return cls(plan.layers, _read_factors(Path(folder) / FACTORS_FILE, plan.layers))


def save_selection(selection: Mapping[str, Config | None], file: str | Path) -> None:
    """Writes a mapping from role, path or pattern to config, or None for dense, as JSON."""
    entries = {key: None if config is None else config.to_dict() for key, config in selection.items()}
    Path(file).write_text(
        json.dumps({"plan_version": PLAN_VERSION, "selection": entries}, indent=2) + "\n", encoding="utf-8"
    )


def load_selection(file: str | Path) -> dict[str, Config | None] | None:
    """The selection in a JSON file, None where it holds a plan's ``layers`` instead; ``ValueError`` naming the file for
    anything else."""
    data = storage.read_json(file)
    try:
        _check_version(data)
        if "selection" not in data and "layers" in data:
            return None
        entries = data.get("selection")
        if not isinstance(entries, dict) or not entries:
            raise ValueError("plan: expected an object 'selection' of role or pattern: config, or 'layers'")
        return {key: None if entry is None else config_from_dict(entry) for key, entry in entries.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def _check_version(data: dict[str, Any]) -> None:
    version = data.get("plan_version")
    if type(version) is not int or version != PLAN_VERSION:
        raise ValueError(f"plan: plan_version is {version!r}, expected {PLAN_VERSION}")


def _read_factors(file: Path, layers: Mapping[str, Config]) -> dict[str, dict[str, Tensor]]:
    """The factors of the layers that are made of factors; every tensor of the file must be one of them."""
    wanted = {
        f"{path}.{name}": (path, name)
        for path, config in layers.items()
        if isinstance(config, LowRankConfig | LowRankSparseConfig)
        for name in (_FACTORS if isinstance(config, LowRankSparseConfig) else _FACTORS[:2])
    }
    if not wanted and not os.path.lexists(file):
        return {}
    stored = storage.read_headers([file])
    for key in sorted(stored.keys() ^ wanted.keys()):
        raise ValueError(f"{file}: tensor {key} is {'missing' if key in wanted else 'not of this plan'}")
    for key, header in stored.items():
        if len(header.shape) != 2 or header.dtype not in _FLOATS:
            raise ValueError(f"{file}: {key} is {header.dtype} of shape {header.shape}, expected a matrix of floats")
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        path, name = wanted[key]
        factors.setdefault(path, {})[name] = tensor
    return factors


def refusal(module: nn.Module, config: Config) -> str | None:
    """None, or why this module cannot be packed as ``config`` (whatever its values are)."""
    # Exactly nn.Linear: a subclass may compute something else with its weight.
    if type(module) is not nn.Linear:
        return f"is {type(module).__name__}, expected torch.nn.Linear"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which a swap would lose"
    if module.weight.dtype not in nm.DTYPES:
        return f"weight is {module.weight.dtype}, expected 16, 32 or 64-bit floats"
    out_features, in_features = module.weight.shape
    pattern = config
    if isinstance(config, Int8Config):
        pattern = config.weights  # type: ignore[assignment]
    elif isinstance(config, LowRankSparseConfig):
        pattern = config.sparse  # type: ignore[assignment]
    if isinstance(pattern, NMConfig):
        if pattern.columns is None and in_features % pattern.m:
            return f"in_features is {in_features}, not divisible by {pattern.m} as {pattern} needs"
        if in_features < pattern.m:
            return f"in_features is {in_features}, expected at least {pattern.m} for {pattern}"
    if isinstance(config, LowRankConfig | LowRankSparseConfig):
        rank = one_shot.rank_of(config, out_features, in_features)
        if rank > min(out_features, in_features):
            return f"rank {rank} is above the smaller of {out_features} x {in_features}"
        if (stored := rank * (out_features + in_features)) > (dense := out_features * in_features):
            return f"rank {rank} would store {stored} numbers, more than the {dense} of the dense weight"
    return None


def obstacle(model: nn.Module, path: str, config: Config) -> str | None:
    """None, or why the layer at ``path`` of ``model`` cannot be packed as ``config``: ``refusal`` of the layer itself,
    code that reads its weight, or another module that has the same one."""
    module = model.get_submodule(path)
    if reason := refusal(module, config) or weight_use(model, path):
        return reason
    names = _shared_weights(model).get(id(module.weight))
    return None if names is None else f"weight is shared with {names}"


def select(
    model: nn.Module, selection: Selection, *, ignore: Iterable[str] = ()
) -> tuple[dict[str, Config], dict[str, str]]:
    """``(chosen, skipped)``: configs by path, and the reason for every other linear layer.

    ``selection`` is one config for all encoder linears, or a mapping whose keys are roles (``ROLES``), paths or glob
    patterns over paths; a path wins over a pattern, a pattern over a role, an earlier pattern over a later one, and
    None leaves a layer dense. ``ignore`` holds paths or patterns to leave out. ``ValueError`` where a key matches
    nothing, is a role that the model's family has not, or nothing is chosen, listing what there was.
    """
    refuse_fused(model, "selection")
    linears = linear_paths(model)
    if isinstance(selection, CONFIG_TYPES):
        by_role: dict[str, Config | None] = dict.fromkeys(ROLES, selection)
        by_pattern: dict[str, Config | None] = {}
    elif isinstance(selection, Mapping):
        by_role = {key: value for key, value in selection.items() if key in ROLES}
        by_pattern = {key: value for key, value in selection.items() if key not in ROLES}
        for key, value in selection.items():
            if value is not None and not isinstance(value, CONFIG_TYPES):
                raise TypeError(f"selection: {key!r} is {type(value).__name__}, expected {_CONFIG_NAMES} or None")
    else:
        raise TypeError(
            f"selection is {type(selection).__name__}, expected {_CONFIG_NAMES}, a mapping or CompressionPlan"
        )
    roles = {layer.path: layer.role for layer in find_layers(model)} if by_role else {}
    if isinstance(selection, Mapping) and (absent := [role for role in by_role if role not in roles.values()]):
        there = ", ".join(dict.fromkeys(roles.values()))
        raise ValueError(f"{type(model).__name__} has no role {absent[0]!r}; it has {there}")
    ignored = match_linears(model, ignore, "ignore")
    matched = match_linears(model, sorted(by_pattern, key=lambda key: key not in linears), "selection")

    chosen: dict[str, Config] = {}
    skipped: dict[str, str] = {}
    for path in linears:
        if path in ignored:
            skipped[path] = f"ignored by {ignored[path]!r}"
            continue
        if path in matched:
            config = by_pattern[matched[path]]
        elif roles.get(path) in by_role:
            config = by_role[roles[path]]
        else:
            skipped[path] = "not selected"
            continue
        if config is None:
            skipped[path] = "left dense by the selection"
        elif reason := obstacle(model, path, config):
            skipped[path] = reason
        else:
            chosen[path] = config
    if not chosen:
        reasons = summarize([f"{path} ({reason})" for path, reason in skipped.items()])
        raise ValueError(f"{type(model).__name__}: no layer to compress; its linear layers: {reasons or 'none'}")
    return chosen, skipped


def match_linears(model: nn.Module, patterns: Iterable[str], label: str) -> dict[str, str]:
    """Path of a dense linear layer -> the first of ``patterns`` that matches it, each a path or a glob over paths.

    ``ValueError`` naming ``label`` where a pattern matches nothing, listing what there was.
    """
    linears = linear_paths(model)
    found: dict[str, str] = {}
    for pattern in patterns:
        hits = [path for path in linears if path == pattern or fnmatchcase(path, pattern)]
        if not hits:
            raise ValueError(
                f"{type(model).__name__}: {label} {pattern!r} matches no linear layer and is no role "
                f"({', '.join(ROLES)}); its linear layers: {summarize(linears)}"
            )
        for path in hits:
            found.setdefault(path, pattern)
    return found


def _shared_weights(model: nn.Module) -> dict[int, str]:
    """id of every parameter that lies in more than one module -> the names it lies under."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, torch.Tensor):
                names.setdefault(id(parameter), []).append(f"{path}.{name}")
    return {key: " and ".join(found) for key, found in names.items() if len(found) > 1}
