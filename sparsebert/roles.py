"""Where the linear layers of an encoder are: query, key, value, attention output and the two of the feed-forward net.

A table per ``config.model_type`` maps each role to its path under a layer. Paths are matched from the encoder down, so
a bare encoder and one under a task head both work. Knows torch alone; a model is told by its attributes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

ROLES = ("query", "key", "value", "attention_output", "intermediate", "output")

_BERT = (
    r"encoder\.layer",
    {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
    },
)
_DISTILBERT = (
    r"transformer\.layer",
    {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "attention_output": "attention.out_lin",
        "intermediate": "ffn.lin1",
        "output": "ffn.lin2",
    },
)
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
}


@dataclass(frozen=True)
class LayerRef:
    """One linear layer of the encoder: its path in the model, its role and the index of its encoder layer."""

    path: str
    role: str
    index: int
    module: nn.Module


def model_type(model: nn.Module) -> str | None:
    """``config.model_type`` of a Hugging Face model, None for any other module."""
    return getattr(getattr(model, "config", None), "model_type", None)


def find_layers(model: nn.Module) -> list[LayerRef]:
    """Every encoder linear, dense or packed, in the order of layers and roles.

    ``ValueError`` naming what was found: for a family without a table, and where a role is missing in some layer.
    """
    kind = model_type(model)
    if kind not in FAMILIES:
        raise ValueError(
            f"{type(model).__name__}: no roles known for model_type {kind!r} (known: {', '.join(sorted(FAMILIES))}); "
            f"select layers by name pattern instead. Its linear layers: {summarize(linear_paths(model))}"
        )
    stem, suffixes = FAMILIES[kind]
    patterns = {role: re.compile(rf"(?:.*\.)?{stem}\.(\d+)\.{re.escape(path)}") for role, path in suffixes.items()}
    found: dict[tuple[int, str], LayerRef] = {}
    for path, module in model.named_modules():
        for role, pattern in patterns.items():
            if match := pattern.fullmatch(path):
                index = int(match[1])
                if (index, role) in found:
                    raise ValueError(
                        f"{type(model).__name__}: two layers are {role} of encoder layer {index}: "
                        f"{found[index, role].path} and {path}"
                    )
                found[index, role] = LayerRef(path, role, index, module)
    count = getattr(model.config, "num_hidden_layers", 1 + max((i for i, _ in found), default=-1))
    missing = [f"{role} of layer {i}" for i in range(count) for role in ROLES if (i, role) not in found]
    if missing or not found:
        raise ValueError(
            f"{type(model).__name__}: model_type {kind!r} lacks {summarize(missing) or 'every role'}; "
            f"its linear layers: {summarize(linear_paths(model))}"
        )
    return [found[i, role] for i in range(count) for role in ROLES]


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of all dense linear layers."""
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def summarize(names: list[str], limit: int = 12) -> str:
    """A list short enough for an error message."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
