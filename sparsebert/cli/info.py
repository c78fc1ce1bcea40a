"""``sparsebert info``: what this machine can serve, or what a checkpoint holds, without loading it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sparsebert import storage
from sparsebert.cli.common import Rendered, megabytes, size_table, table
from sparsebert.roles import ROLES, role_of_path
from sparsebert.storage import Stored

# The weights that the machine's kernels are listed for: one of BERT-base in every format, at a usual size of it.
EXAMPLE_FEATURES = (768, 768)
EXAMPLES: dict[str, dict[str, Any]] = {
    "nm": {"n": 2, "m": 4},
    "bitmap": {"nnz": 58_982},
    "low_rank": {"rank": 96},
    "low_rank_sparse": {"rank": 96, "sparse": "rows", "count": 76},
    "int8": {"activations": "dynamic"},
    "dense": {},
}
EXAMPLE_TOKENS = 128
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def machine() -> dict[str, Any]:
    """Versions, the device, and for a weight of BERT-base in each format which layouts this machine can hold and what
    runs them."""
    import torch

    from sparsebert.bench.environment import device_label, environment
    from sparsebert.cli.common import the_device
    from sparsebert.nn import MODULES
    from sparsebert.ops import devices, layouts, measurements, select

    device = the_device(None)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    served: list[dict[str, Any]] = []
    for kind, sizes in EXAMPLES.items():
        example: Any = MODULES[kind]
        spec = example(*EXAMPLE_FEATURES, **sizes, device="meta").spec
        for name in layouts.names(spec.op):
            reason = layouts.get(spec.op, name).supports(spec, dtype, device)
            problem = select.Problem(name, devices.describe(device), dtype, spec, EXAMPLE_TOKENS, activation="none")
            kernels = [
                {"backend": kernel.backend, "description": kernel.description, "refused": reason or refused}
                for kernel, refused in select.reasons(problem)
            ]
            served.append({"op": spec.op, "weight": spec.label, "layout": name, "refused": reason, "kernels": kernels})
    backends: dict[str, dict[str, Any]] = {}
    for backend in select.BACKENDS:
        usable: dict[str, list[str]] = {}
        refusals = []
        for entry in served:
            for kernel in entry["kernels"]:
                if kernel["backend"] == backend and kernel["refused"] is None:
                    usable.setdefault(entry["op"], []).append(entry["layout"])
                elif kernel["backend"] == backend:
                    refusals.append(kernel["refused"])
        why = None if usable else next(iter(refusals), "no kernel in this version")
        backends[backend] = {"layouts": usable, "refused": why}
    file = measurements.path()
    rows = measurements.load()
    here = devices.describe(device).name
    return {
        "environment": environment(),
        "device": device_label(device),
        "example": {
            "out_features": EXAMPLE_FEATURES[1],
            "in_features": EXAMPLE_FEATURES[0],
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": EXAMPLE_TOKENS,
        },
        "backends": backends,
        "layouts": served,
        "forced_backend": select.forced_backend(),
        "measurements": {
            "file": str(file),
            "exists": file.exists(),
            "rows": len(rows),
            "rows_of_this_device": sum(row.device == here for row in rows),
            "shipped_rows_of_this_device": sum(row.device == here for row in measurements.shipped()),
        },
    }


def render_machine(result: dict[str, Any]) -> Rendered:
    env, example = result["environment"], result["example"]
    yield f"sparsebert {env['sparsebert']} on {result['device']}"
    names = ("python", "torch", "cuda", "triton", "transformers", "gpu", "capability", "driver", "platform")
    yield table(["", "found"], [[name, env[name]] for name in names if env.get(name) is not None])
    size = f"{example['out_features']} x {example['in_features']}, {example['dtype']}, {example['tokens']} tokens"
    yield f"Backends here, for a weight of {size}:"
    yield table(
        ["backend", "runs", "why not"],
        [[name, ", ".join(x["layouts"]) or "-", x["refused"] or ""] for name, x in result["backends"].items()],
    )
    rows = []
    shown = None
    for entry in result["layouts"]:
        runs = [kernel for kernel in entry["kernels"] if kernel["refused"] is None]
        usable = [f"{kernel['backend']} ({kernel['description']})" for kernel in runs]
        # What refuses a kernel is what a user can act on, where the layout itself would fit.
        refused = entry["refused"] or ("" if usable else "; ".join(kernel["refused"] for kernel in entry["kernels"]))
        weight = "" if entry["weight"] == shown else entry["weight"]
        shown = entry["weight"]
        rows.append([weight, entry["layout"], usable[0] if usable else "-", refused])
    yield "Layouts that it can be held in here, by format:"
    yield table(["weight", "layout", "run by", "why not"], rows)
    if result["forced_backend"]:
        yield f"SPARSEBERT_BACKEND forces the backend {result['forced_backend']}"
    found = result["measurements"]
    if found["exists"]:
        of = f"{found['rows']} measurements, {found['rows_of_this_device']} of this device"
        yield f"measured choices: {found['file']} ({of})"
    else:
        yield f"measured choices: none yet; `sparsebert tune` will write {found['file']}"
    if found["shipped_rows_of_this_device"]:
        yield f"shipped with the package: {found['shipped_rows_of_this_device']} measurements of this device"


def inspect(path: str) -> dict[str, Any]:
    """A checkpoint by config.json and the headers of its safetensors files. ``ValueError`` where these do not fit.

    The tensors themselves are not read, so their values are not vouched for.
    """
    from sparsebert.cli import models

    source = models.find_folder(path)
    files = storage.weight_files(source.folder or Path())
    tensors = storage.read_headers(files)
    file_bytes = {file.name: file.stat().st_size for file in files}
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
    # transformers writes some models under other names than their modules have; role and index tell these apart.
    stems = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    stored_at = {place: path for path in stems if (place := _place(source, path))}
    layers = {}
    for path, entry in entries.items():
        module = module_from_entry(entry, name=path, device="meta")
        role, index = entry.get("role"), entry.get("index")
        if role not in (None, *ROLES) or not (index is None or type(index) is int):
            raise ValueError(f"{path}: layer map gives role {role!r} and index {index!r}, expected a role and an int")
        place = _place(source, path)
        other = stored_at.get(place, path) if place else path
        stored = {}
        for name, tensor in module.state_dict().items():
            key, stored[name] = _find(f"{path}.{name}", f"{other}.{name}", tensors, source.name)
            if stored[name].shape != tuple(tensor.shape):
                raise ValueError(
                    f"{key}: has shape {stored[name].shape} in the file, expected {tuple(tensor.shape)} by the map"
                )
        layers[path] = {
            "path": path,
            "role": role,
            "index": index,
            "format": module.description,
            "dense_bytes": _dense_bytes(module, entry, path, stored),
            "disk_bytes": sum(tensor.bytes for tensor in stored.values()),
        }
    return layers


def _dense_bytes(module: Any, entry: dict[str, Any], path: str, stored: dict[str, Stored]) -> int:
    """Bytes of the ``nn.Linear`` in the dtype that is stored: a model cast after packing leaves the map's behind."""
    import torch

    from sparsebert.nn import module_from_entry

    for name, tensor in module.state_dict().items():
        # What has another dtype than the map says is held so whatever the model's: integers, scales.
        if str(tensor.dtype) == f"torch.{entry['dtype']}" and (actual := _DTYPES.get(stored[name].dtype)):
            dtype = getattr(torch, actual)
            return module_from_entry(entry, name=path, device="meta", dtype=dtype).dense_bytes()
    return module.dense_bytes()


def _dense_layers(source: Any, tensors: dict[str, Stored], packed: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The linear layers that have a role and are stored as they always were."""
    layers = []
    for key, tensor in tensors.items():
        path = key.removesuffix(".weight")
        if path == key or len(tensor.shape) != 2 or path in packed:
            continue
        bias = tensors.get(f"{path}.bias")
        size = tensor.bytes + (bias.bytes if bias else 0)
        if place := _place(source, path):
            entry = {"path": path, "role": place[0], "index": place[1], "format": "dense"}
            layers.append({**entry, "dense_bytes": size, "disk_bytes": size})
    return layers


def _place(source: Any, path: str) -> tuple[str, int] | None:
    config = source.config
    return role_of_path(config.get("model_type"), path, inner=config.get("inner_group_num"))


def _find(key: str, other: str, tensors: dict[str, Stored], name: str) -> tuple[str, Stored]:
    """A tensor of the map under its name in the file: a base model saved by itself has dropped its prefix."""
    for candidate in (key, key.partition(".")[2], other):
        if candidate in tensors:
            return candidate, tensors[candidate]
    raise ValueError(f"{name}: the files have no tensor {key}, which the layer map names")
