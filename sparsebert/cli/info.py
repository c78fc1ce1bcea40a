"""``sparsebert info``: what this machine can serve, or what a checkpoint holds, without loading it."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebert.cli.common import Rendered, megabytes, size_table, table
from sparsebert.roles import FAMILIES, ROLES

# The weight that the machine's kernels are listed for: one of BERT-base.
EXAMPLE = (2, 4, 768, 768)
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

# A header describes each tensor in about 100 bytes.
_MAX_HEADER_BYTES = 8 << 20
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Stored:
    """One tensor by its entry in a safetensors header, ``dtype`` as it is written there."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * _ITEM_BYTES[self.dtype]


def machine() -> dict[str, Any]:
    """Versions, the device, and for a weight of BERT-base which layouts this machine can hold and what runs them."""
    import torch

    from sparsebert.bench.environment import device_label, environment
    from sparsebert.cli.common import the_device
    from sparsebert.ops import layouts, measurements, select

    device = the_device(None)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    spec = layouts.Spec(*EXAMPLE)
    served: list[dict[str, Any]] = []
    for name in layouts.names():
        reason = layouts.get(name).supports(spec, dtype, device)
        problem = select.Problem("nm_linear", name, device.type, select.capability(device), dtype, *spec, 128, "none")
        kernels = [
            {"backend": kernel.backend, "description": kernel.description, "refused": reason or refused}
            for kernel, refused in select.review(problem)
        ]
        served.append({"layout": name, "refused": reason, "kernels": kernels})
    backends: dict[str, dict[str, Any]] = {}
    for backend in select.BACKENDS:
        refusals = {
            entry["layout"]: kernel["refused"]
            for entry in served
            for kernel in entry["kernels"]
            if kernel["backend"] == backend
        }
        usable = [layout for layout, refused in refusals.items() if refused is None]
        why = None if usable else next(iter(refusals.values()), "no kernel in this version")
        backends[backend] = {"layouts": usable, "refused": why}
    file = measurements.path()
    rows = measurements.load()
    here = measurements.device_name(device)
    return {
        "environment": environment(),
        "device": device_label(device),
        "example": {
            "op": "nm_linear",
            "pattern": f"{spec.n}:{spec.m}",
            "out_features": spec.out_features,
            "in_features": spec.in_features,
            "dtype": str(dtype).removeprefix("torch."),
        },
        "backends": backends,
        "layouts": served,
        "forced_backend": select.forced_backend(),
        "measurements": {
            "file": str(file),
            "exists": file.exists(),
            "rows": len(rows),
            "rows_of_this_device": sum(row.device == here for row in rows),
        },
    }


def render_machine(result: dict[str, Any]) -> Rendered:
    env, example = result["environment"], result["example"]
    yield f"sparsebert {env['sparsebert']} on {result['device']}"
    names = ("python", "torch", "cuda", "triton", "transformers", "gpu", "capability", "driver", "platform")
    yield table(["", "found"], [[name, env[name]] for name in names if env.get(name) is not None])
    weight = f"{example['pattern']} weight, {example['out_features']} x {example['in_features']}, {example['dtype']}"
    yield f"Backends here, for a {weight}:"
    yield table(
        ["backend", "runs layouts", "why not"],
        [[name, ", ".join(x["layouts"]) or "-", x["refused"] or ""] for name, x in result["backends"].items()],
    )
    rows = []
    for entry in result["layouts"]:
        usable = [kernel["description"] for kernel in entry["kernels"] if kernel["refused"] is None]
        rows.append([entry["layout"], "; ".join(usable) or "-", entry["refused"] or ""])
    yield "Layouts that it can be held in here:"
    yield table(["layout", "run by", "why not"], rows)
    if result["forced_backend"]:
        yield f"SPARSEBERT_BACKEND forces the backend {result['forced_backend']}"
    found = result["measurements"]
    if found["exists"]:
        of = f"{found['rows']} measurements, {found['rows_of_this_device']} of this device"
        yield f"measured choices: {found['file']} ({of})"
    else:
        yield f"measured choices: none yet; `sparsebert tune` will write {found['file']}"


def inspect(path: str) -> dict[str, Any]:
    """A checkpoint by config.json and the headers of its safetensors files. ``ValueError`` where these do not fit.

    The tensors themselves are not read, so their values are not vouched for.
    """
    from sparsebert.cli import models

    source = models.find_folder(path)
    files, tensors = _headers(source)
    folder = source.folder or Path()
    file_bytes = {name: (folder / name).stat().st_size for name in files}
    packed = _packed_layers(source, tensors) if source.packed else {}
    layers = [*packed.values(), *_dense_layers(source, tensors, packed)]
    layers.sort(key=lambda layer: (layer["index"] is None, layer["index"] or 0))
    # As sparsebert.size_report counts: the layers that have a role, or the packed ones where none has.
    in_encoder = [layer for layer in layers if layer["role"]] or layers
    encoder = {key: sum(layer[key] for layer in in_encoder) for key in ("dense_bytes", "disk_bytes")}
    stored = sum(tensor.bytes for tensor in tensors.values())
    saved = sum(layer["dense_bytes"] - layer["disk_bytes"] for layer in packed.values())
    dtypes = Counter[str]()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += tensor.count
    floats = {name: dtypes[kind] for kind, name in _DTYPES.items() if dtypes[kind]}
    packing = source.packing or {}
    return {
        "path": path,
        "architecture": source.architecture,
        "model_type": source.config.get("model_type"),
        "compressed": bool(packed),
        "format_version": packing.get("format_version"),
        "dtype": max(floats, key=lambda name: floats[name]) if floats else None,
        "formats": dict(Counter(layer["format"] for layer in layers)),
        "layers": layers,
        "size": {"encoder": encoder, "model": {"dense_bytes": stored + saved, "disk_bytes": stored}},
        "tensors": len(tensors),
        "files": file_bytes,
        "file_bytes": sum(file_bytes.values()),
    }


def render(result: dict[str, Any]) -> Rendered:
    what = "compressed by sparsebert" if result["compressed"] else "not compressed"
    version = f" (format_version {result['format_version']})" if result["compressed"] else ""
    yield f"{result['path']}: {result['architecture'] or 'model of unknown class'}, {what}{version}"
    files = result["files"]
    names = f"{len(files)} files" if len(files) > 1 else next(iter(files))
    yield f"{names}, {megabytes(result['file_bytes'])}, {result['tensors']} tensors in {result['dtype']}"
    if result["layers"]:
        formats = sorted(result["formats"], key=lambda name: name == "dense")
        counts = Counter((layer["role"] or "other", layer["format"]) for layer in result["layers"])
        roles = sorted({role for role, _ in counts}, key=lambda role: (*ROLES, role).index(role))
        rows = [[role, *(str(counts[role, name] or "-") for name in formats)] for role in roles]
        yield "Linear layers by role and format:"
        yield table(["role", *formats], rows)
        yield size_table(result["size"])
    else:
        kind = result["model_type"]
        yield f"no layer of an encoder that sparsebert knows by role (model_type {kind!r})"
    if result["compressed"]:
        yield "Read from config.json and the files' headers alone; `sparsebert eval` loads it and checks every tensor."


def _headers(source: Any) -> tuple[list[str], dict[str, Stored]]:
    """File names, and every tensor's entry in their headers."""
    from safetensors import SafetensorError, safe_open

    from sparsebert.cli import models

    folder: Path = source.folder
    names = [WEIGHTS]
    # An index beside an unsharded file is a leftover that no loader reads.
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        shards = models.read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{folder / INDEX}: weight_map is malformed, expected an object of tensor name: file name")
        names = sorted(set(shards.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{folder / INDEX}: names {name!r}, expected a safetensors file of the same folder")
    tensors: dict[str, Stored] = {}
    for name in names:
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{source.name}: there is no {name} in it")
        with file.open("rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{file}: its header claims {length} bytes, expected at most {_MAX_HEADER_BYTES}")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():
                    part = opened.get_slice(key)
                    dtype, shape = part.get_dtype(), tuple(part.get_shape())
                    if dtype not in _ITEM_BYTES:
                        raise ValueError(f"{file}: {key} is {dtype}, expected one of {', '.join(_ITEM_BYTES)}")
                    tensors[key] = Stored(dtype, shape)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file: {error}") from None
    return names, tensors


def _packed_layers(source: Any, tensors: dict[str, Stored]) -> dict[str, dict[str, Any]]:
    """Path -> one entry of the result, for every layer of the map; ``ValueError`` where the files say otherwise."""
    from sparsebert.nn import module_from_entry
    from sparsebert.swap import FORMAT_VERSION

    packing = source.packing
    if (version := packing.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{source.name}: format_version is {version!r}, this sparsebert reads {FORMAT_VERSION}")
    entries = packing.get("layers")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{source.name}: the layer map is malformed, expected an object of layer path: entry")
    layers = {}
    for path, entry in entries.items():
        module = module_from_entry(entry, name=path, device="meta")
        role, index = entry.get("role"), entry.get("index")
        if role not in (None, *ROLES) or not (index is None or type(index) is int):
            raise ValueError(f"{path}: layer map gives role {role!r} and index {index!r}, expected a role and an int")
        stored = {}
        for name, tensor in module.state_dict().items():
            key, stored[name] = _find(f"{path}.{name}", tensors, source.name)
            if stored[name].shape != tuple(tensor.shape):
                raise ValueError(
                    f"{key}: has shape {stored[name].shape} in the file, expected {tuple(tensor.shape)} by the map"
                )
        disk = sum(tensor.bytes for tensor in stored.values())
        bias = stored["bias"].bytes if "bias" in stored else 0
        item = _ITEM_BYTES[stored["values"].dtype]
        layers[path] = {
            "path": path,
            "role": role,
            "index": index,
            "format": str(module.config),
            "dense_bytes": module.in_features * module.out_features * item + bias,
            "disk_bytes": disk,
        }
    return layers


def _dense_layers(source: Any, tensors: dict[str, Stored], packed: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The linear layers that have a role and are stored as they always were."""
    kind = source.config.get("model_type")
    stem, suffixes = FAMILIES.get(kind if isinstance(kind, str) else "", ("", {}))
    patterns = {role: re.compile(rf"(?:.*\.)?{stem}\.(\d+)\.{re.escape(path)}") for role, path in suffixes.items()}
    layers = []
    for key, tensor in tensors.items():
        path = key.removesuffix(".weight")
        if path == key or len(tensor.shape) != 2 or path in packed:
            continue
        bias = tensors.get(f"{path}.bias")
        size = tensor.bytes + (bias.bytes if bias else 0)
        for role, pattern in patterns.items():
            if match := pattern.fullmatch(path):
                entry = {"path": path, "role": role, "index": int(match[1]), "format": "dense"}
                layers.append({**entry, "dense_bytes": size, "disk_bytes": size})
    return layers


def _find(key: str, tensors: dict[str, Stored], name: str) -> tuple[str, Stored]:
    """A tensor of the map under its name in the file: a base model saved by itself has dropped its prefix."""
    for candidate in (key, key.partition(".")[2]):
        if candidate in tensors:
            return candidate, tensors[candidate]
    raise ValueError(f"{name}: the files have no tensor {key}, which the layer map names")
