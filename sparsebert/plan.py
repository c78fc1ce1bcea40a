"""What is to be done to which layer: ``CompressionPlan``, and how a user's selection becomes one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsebert.configs import NMConfig, config_from_dict
from sparsebert.formats import nm
from sparsebert.roles import ROLES, find_layers, linear_paths, summarize

PLAN_VERSION = 1
PLAN_FILE = "plan.json"

# What compress_ and the methods take: one config for every encoder linear, or a mapping from role or pattern.
Selection = NMConfig | Mapping[str, NMConfig | None]


@dataclass(frozen=True)
class CompressionPlan:
    """Module path -> config for every layer to pack. A method's ``finalize`` returns one.

    A plan makes a promise about weights that are already pruned; ``verify`` proves it before anything is packed.
    """

    layers: Mapping[str, NMConfig] = field(default_factory=dict)

    def verify(self, model: nn.Module) -> None:
        """``ValueError`` naming the layer and its first bad group unless every layer obeys its config."""
        for path, config in self.layers.items():
            try:
                module = model.get_submodule(path)
            except AttributeError:
                raise ValueError(
                    f"{path}: the plan names this layer, but {type(model).__name__} has no such module; "
                    f"its linear layers: {summarize(linear_paths(model))}"
                ) from None
            if reason := refusal(module, config):
                raise ValueError(f"{path}: {reason}")
            weight = module.weight.detach()  # type: ignore[union-attr, operator]
            if (bad := nm.find_violation(weight, config.n, config.m)) is not None:
                row, column, count = bad
                raise ValueError(
                    f"{path}: weight does not obey {config}: row {row}, columns {column} to {column + config.m - 1} "
                    f"hold {count} non-zeros, expected at most {config.n}"
                )

    def to_dict(self) -> dict[str, Any]:
        layers = {path: config.to_dict() for path, config in self.layers.items()}
        return {"plan_version": PLAN_VERSION, "layers": layers}

    @classmethod
    def from_dict(cls, data: Any) -> CompressionPlan:
        if not isinstance(data, dict) or not isinstance(data.get("layers"), dict):
            raise ValueError("plan: expected a JSON object with an object 'layers'")
        if data.get("plan_version") != PLAN_VERSION:
            raise ValueError(f"plan: plan_version is {data.get('plan_version')!r}, expected {PLAN_VERSION}")
        return cls({path: config_from_dict(entry) for path, entry in data["layers"].items()})

    def save(self, folder: str | Path) -> Path:
        """Writes ``plan.json`` into ``folder``, which must exist."""
        file = Path(folder) / PLAN_FILE
        file.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return file

    @classmethod
    def load(cls, folder: str | Path) -> CompressionPlan:
        file = Path(folder) / PLAN_FILE
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error


def refusal(module: nn.Module, config: NMConfig) -> str | None:
    """None, or why this module cannot be packed as ``config`` (whatever its values are)."""
    # Exactly nn.Linear: a subclass may compute something else with its weight.
    if type(module) is not nn.Linear:
        return f"is {type(module).__name__}, expected torch.nn.Linear"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which a swap would lose"
    if module.weight.dtype not in nm.DTYPES:
        return f"weight is {module.weight.dtype}, expected 16, 32 or 64-bit floats"
    if module.in_features % config.m:
        return f"in_features is {module.in_features}, not divisible by {config.m} as {config} needs"
    return None


def select(
    model: nn.Module, selection: Selection, *, ignore: Iterable[str] = ()
) -> tuple[dict[str, NMConfig], dict[str, str]]:
    """``(chosen, skipped)``: configs by path, and the reason for every other linear layer.

    ``selection`` is one config for all encoder linears, or a mapping whose keys are roles (``ROLES``), paths or glob
    patterns over paths; a path wins over a pattern, a pattern over a role, an earlier pattern over a later one, and
    None leaves a layer dense. ``ignore`` holds paths or patterns to leave out. ``ValueError`` where a key matches
    nothing or nothing is chosen, listing what there was.
    """
    linears = {path: model.get_submodule(path) for path in linear_paths(model)}
    if isinstance(selection, NMConfig):
        by_role: dict[str, NMConfig | None] = dict.fromkeys(ROLES, selection)
        by_pattern: dict[str, NMConfig | None] = {}
    elif isinstance(selection, Mapping):
        by_role = {key: value for key, value in selection.items() if key in ROLES}
        by_pattern = {key: value for key, value in selection.items() if key not in ROLES}
        for key, value in selection.items():
            if value is not None and not isinstance(value, NMConfig):
                raise TypeError(f"selection: {key!r} is {type(value).__name__}, expected NMConfig or None")
    else:
        raise TypeError(f"selection is {type(selection).__name__}, expected NMConfig, a mapping or CompressionPlan")
    roles = {layer.path: layer.role for layer in find_layers(model)} if by_role else {}
    ignored = _matches(model, list(ignore), linears, "ignore")
    patterns = sorted(by_pattern, key=lambda key: key not in linears)
    matched = _matches(model, patterns, linears, "selection")

    shared = _shared_weights(model)
    chosen: dict[str, NMConfig] = {}
    skipped: dict[str, str] = {}
    for path, module in linears.items():
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
        elif reason := refusal(module, config):
            skipped[path] = reason
        elif id(module.weight) in shared:
            skipped[path] = f"weight is shared with {shared[id(module.weight)]}"
        else:
            chosen[path] = config
    if not chosen:
        reasons = summarize([f"{path} ({reason})" for path, reason in skipped.items()])
        raise ValueError(f"{type(model).__name__}: no layer to compress; its linear layers: {reasons or 'none'}")
    return chosen, skipped


def _matches(model: nn.Module, patterns: list[str], linears: Mapping[str, nn.Module], label: str) -> dict[str, str]:
    """Path -> the first pattern that matches it; every pattern must match something."""
    found: dict[str, str] = {}
    for pattern in patterns:
        hits = [path for path in linears if path == pattern or fnmatchcase(path, pattern)]
        if not hits:
            raise ValueError(
                f"{type(model).__name__}: {label} {pattern!r} matches no linear layer and is no role "
                f"({', '.join(ROLES)}); its linear layers: {summarize(list(linears))}"
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
