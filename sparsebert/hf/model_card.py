"""The README.md of a packed checkpoint: what it is, how large it is, and what it takes to load it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from typing import TYPE_CHECKING

import torch

from sparsebert.report import size_report
from sparsebert.swap import quantization_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tells a card that may be overwritten from one that somebody wrote.
MARKER = "<!-- written by sparsebert: remove this line to keep your edits -->"


def model_card(model: PreTrainedModel) -> str:
    """Markdown with the hub's YAML header for a packed ``model``; states sizes, and nothing that was not measured.

    ``ValueError`` where no layer is packed.
    """
    layers = quantization_config(model)["layers"]
    name = type(model).__name__
    source = _hub_id(model)
    report = size_report(model).to_dict()
    device = next(iter(model.parameters())).device

    header = ["---", "library_name: transformers", "tags:", "- sparsebert"]
    if model_type := getattr(model.config, "model_type", ""):
        header.append(f"- {json.dumps(model_type)}")
    if source:
        header.append(f"base_model: {json.dumps(source)}")
    header.append("---")

    rows = [
        f"| {label} | {part['dense_bytes']:,} | {part['disk_bytes']:,} | {part['memory_bytes']:,} |"
        for label, part in (("encoder", report["encoder"]), ("whole model", report["model"]))
    ]
    return "\n".join(
        [
            *header,
            "",
            MARKER,
            "",
            f"# {name}, packed with sparsebert",
            "",
            f"{f'Made from {source}. ' if source else ''}{len(layers)} linear layers are stored packed:",
            "",
            *(f"- {line}" for line in _what(layers)),
            "",
            "## Loading",
            "",
            "`import sparsebert` is **required** before `from_pretrained`. Without it transformers does not know the",
            "packed layers: it fills them with random weights, only warns, and the model's output is noise.",
            "",
            "```python",
            "import sparsebert  # registers the packed layers with transformers",
            f"from transformers import {name}",
            "",
            f'model = {name}.from_pretrained("path/of/this/folder")',
            "```",
            "",
            "The strict way raises an error where any tensor is missing, left over or malformed:",
            "",
            "```python",
            "import sparsebert as sb",
            "",
            'model = sb.load_pretrained("path/of/this/folder")',
            "```",
            "",
            "transformers refuses `.half()` and `.float()` on a loaded packed model; ask for the dtype when loading",
            "instead: `sb.load_pretrained(path, dtype=torch.float16)`.",
            "",
            "## Size in bytes",
            "",
            "Parameters and buffers; `dense` is the same model with ordinary linear layers in the same dtype.",
            "",
            f"| | dense | on disk | in memory ({_device_name(device)}, when this was saved) |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            "In memory each layer is held in the layout the device computes with; on a CPU that is by default the",
            "unpacked weight. Accuracy and speed were not measured when this file was written.",
            "",
        ]
    )


def _what(layers: dict[str, dict]) -> list[str]:
    """One line for each kind of packed layer, with how many there are of each role."""
    kinds: dict[str, Counter[str]] = {}
    for entry in layers.values():
        pattern = f" {entry['n']}:{entry['m']}" if entry["format"] == "nm" else ""
        kinds.setdefault(f"`{entry['format']}`{pattern}, {entry['dtype']}", Counter())[
            entry.get("role") or "other"
        ] += 1
    return [
        f"{kind}: {', '.join(f'{count} {role}' for role, count in sorted(roles.items()))}"
        for kind, roles in sorted(kinds.items())
    ]


def _hub_id(model: PreTrainedModel) -> str | None:
    """``organisation/name`` where the model came from the hub; never a path of the machine it was made on."""
    source = getattr(model.config, "_name_or_path", "") or ""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not source.startswith(".")
    return source if is_id and not os.path.exists(source) else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
