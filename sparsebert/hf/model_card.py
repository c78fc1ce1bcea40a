"""The README.md of a packed checkpoint: what it is, how large it is, and what it takes to load it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from typing import TYPE_CHECKING

import torch

from sparsebert.report import packed_layers, size_report
from sparsebert.swap import quantization_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tells a card that may be overwritten from one that somebody wrote.
MARKER = "<!-- written by sparsebert: remove this line to keep your edits -->"

# Format -> what of a layer is not the dense model's, as a sentence about the format.
_APPROXIMATE = {
    "nm": "the weights outside the pattern and the kept columns are zero; the others are stored as they are.",
    "bitmap": "the weights that are not stored are zero; the others are stored as they are.",
    "low_rank": "the weight was replaced by the product of two factors of the given rank.",
    "low_rank_sparse": "the weight was replaced by the product of two factors of the given rank plus a sparse part.",
    "int8": "each weight is rounded to a whole multiple, -127 to 127, of its output channel's scale.",
    "dense": "nothing: the weights are stored as they are.",
}
# Mode of int8 activations -> what becomes of the inputs.
_ACTIVATIONS = {
    "dynamic": "The inputs are rounded to 8 bits as well, with one scale for each token, the one at hand.",
    "static": "The inputs are rounded to 8 bits as well, with one scale for each layer that was measured beforehand; "
    "larger inputs are clipped.",
}
# (format, layout) -> what is in memory, as a clause about the layers; a layout of no such pair is named alone.
_HELD = {
    ("nm", "neutral"): "as on disk; where no kernel reads that, they are unpacked in every call",
    ("nm", "dense"): "as the unpacked weight, the size of a dense layer",
    ("nm", "cusparselt"): "packed, in the order of cuSPARSELt",
    ("nm", "cutlass"): "packed, in the order of CUTLASS",
    ("nm", "mma_sp"): "packed, in the order of the sparse tensor cores: 9 bits a weight",
    ("bitmap", "neutral"): "as on disk; where no kernel reads that, they are unpacked in every call",
    ("bitmap", "chunked"): "packed, and where the weights of every 256 inputs begin: 4 bytes each",
    ("bitmap", "dense"): "as the unpacked weight, the size of a dense layer",
    ("low_rank", "neutral"): "as on disk: the factors, which are multiplied with as they are",
    ("low_rank", "padded"): "as factors, the rank filled up with zeros to a multiple of 16",
    ("low_rank", "dense"): "as the product of the factors, beside them: more than a dense layer",
    ("low_rank_sparse", "neutral"): "as on disk",
    ("low_rank_sparse", "padded"): "as on disk, the rank filled up with zeros to a multiple of 16",
    ("low_rank_sparse", "grouped"): "as factors, the rank filled up with zeros to a multiple of 16, and kept rows, and "
    "which feature each row is: 4 bytes a feature more",
    (
        "low_rank_sparse",
        "mma_sp",
    ): "packed, in the order of the sparse tensor cores, the rank filled up with zeros to a multiple of 16",
    ("low_rank_sparse", "stacked"): "as factors, the kept rows below the second one: the size on disk",
    ("low_rank_sparse", "dense"): "as the unpacked weight, beside what is on disk: more than a dense layer",
    ("int8", "neutral"): "as on disk",
    ("int8", "unpacked"): "as 8-bit integers with their zeros, one byte a weight",
    ("int8", "mma_sp"): "packed, in the order of the sparse tensor cores: 5 bits a weight",
    ("int8", "float"): "as integers in fp32 numbers, four bytes a weight, for a CPU without 8-bit products",
    ("int8", "dense"): "as the rounded weight in floats, beside what is on disk: more than a dense layer; their inputs "
    "are then not rounded",
    ("dense", "neutral"): "as on disk",
    ("dense", "dense"): "as on disk",
}


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
            "## What is approximate",
            "",
            *(f"- {line}" for line in _approximate(layers)),
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
            "On a device each layer is held in one layout, chosen for that device. When this was saved:",
            "",
            *(f"- {line}" for line in _held(model)),
            "",
            "Accuracy and speed were not measured when this file was written.",
            "",
        ]
    )


def _what(layers: dict[str, dict]) -> list[str]:
    """One line for each kind of packed layer, with how many there are of each role."""
    kinds: dict[str, Counter[str]] = {}
    for entry in layers.values():
        kind = f"`{entry['format']}`{_pattern(entry)}, {entry['dtype']}"
        kinds.setdefault(kind, Counter())[entry.get("role") or "other"] += 1
    return [
        f"{kind}: {', '.join(f'{count} {role}' for role, count in sorted(roles.items()))}"
        for kind, roles in sorted(kinds.items())
    ]


def _pattern(entry: dict) -> str:
    """What a layer keeps, from its entry in the layer map."""
    parts = [entry["activations"]] if "activations" in entry else []
    if "rank" in entry:
        parts.append(f"rank {entry['rank']}")
    if "sparse" in entry:
        parts.append("+")
    if "rows" in entry:
        parts.append(f"{entry['rows']} rows")
    if "n" in entry:
        parts.append(f"{entry['n']}:{entry['m']}")
    if "nnz" in entry:
        weights = entry["in_features"] * entry.get("kept_rows", entry["out_features"])
        parts.append(f"{100 * entry['nnz'] / weights:.3g} % of the weights")
    if "columns" in entry:
        parts.append(f"in {entry['columns']} of {entry['in_features']} columns")
    if "kept_rows" in entry:
        parts.append(f"in {entry['kept_rows']} of {entry['out_features']} rows")
    return "".join(f" {part}" for part in parts)


def _approximate(layers: dict[str, dict]) -> list[str]:
    """One line for each format, and for each mode of activations: in what the layers differ from dense ones."""
    lines = []
    for name, text in _APPROXIMATE.items():
        entries = [entry for entry in layers.values() if entry["format"] == name]
        modes = sorted({entry["activations"] for entry in entries if "activations" in entry})
        if name == "int8" and any("n" in entry for entry in entries):
            text += " Where a pattern is given, the weights outside it are zero."
        if entries:
            lines.append(" ".join([f"`{name}`: {text}", *(f"{mode}: {_ACTIVATIONS[mode]}" for mode in modes)]))
    if any("kept_rows" in entry for entry in layers.values()):
        lines.append("rows that are not kept were left out because the layer after them reads none of their outputs.")
    return lines


def _held(model: PreTrainedModel) -> list[str]:
    """One line for each format and layout that is held now."""
    counts = Counter((module.format, module.layout) for _, module in packed_layers(model))
    return [
        f"`{name}` in layout `{layout}`, {_layers(count)}: {_HELD.get((name, layout), 'in an order of its kernel')}."
        for (name, layout), count in sorted(counts.items())
    ]


def _layers(count: int) -> str:
    return f"{count} layer" + ("" if count == 1 else "s")


def _hub_id(model: PreTrainedModel) -> str | None:
    """``organisation/name`` where the model came from the hub; never a path of the machine it was made on."""
    source = getattr(model.config, "_name_or_path", "") or ""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not source.startswith(".")
    return source if is_id and not os.path.exists(source) else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
