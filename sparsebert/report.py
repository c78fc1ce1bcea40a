"""What a compression did, what a model costs, and what runs where. Everything here is returned, nothing printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparsebert.nn import PackedLinear
from sparsebert.nn.fused_encoder_layer import held_by, normalized
from sparsebert.ops import layout_choice, layouts, linear_layer_norm, measurements, select
from sparsebert.ops.devices import describe
from sparsebert.roles import find_layers


@dataclass(frozen=True)
class Bytes:
    """Bytes of parameters and buffers: as dense layers, in a checkpoint, and held in memory now."""

    dense: int
    disk: int
    memory: int

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.dense + other.dense, self.disk + other.disk, self.memory + other.memory)

    def to_dict(self) -> dict[str, int]:
        return {"dense_bytes": self.dense, "disk_bytes": self.disk, "memory_bytes": self.memory}


@dataclass(frozen=True)
class LayerSize:
    path: str
    role: str | None
    index: int | None
    format: str
    layout: str
    bytes: Bytes


@dataclass(frozen=True)
class SizeReport:
    """Sizes of the encoder's linear layers and of the whole model, which are never mixed."""

    encoder: Bytes
    model: Bytes
    layers: tuple[LayerSize, ...]

    def to_dict(self) -> dict[str, Any]:
        layers = [{**asdict(layer), "bytes": layer.bytes.to_dict()} for layer in self.layers]
        return {"encoder": self.encoder.to_dict(), "model": self.model.to_dict(), "layers": layers}

    def __str__(self) -> str:
        rows = [
            [
                name,
                *(f"{value / 1e6:.2f} MB" for value in (size.dense, size.disk, size.memory)),
                _percent(size),
            ]
            for name, size in (("encoder linears", self.encoder), ("whole model", self.model))
        ]
        return table(["", "dense", "on disk", "in memory", "disk / dense"], rows)

    __repr__ = __str__


@dataclass(frozen=True)
class CompressedLayer:
    """One packed layer: the config asked for, what came of it, and ``kept_energy``, 1 - |W - W'|^2 / |W|^2 with the
    packed weight W' (squared Frobenius norms)."""

    path: str
    role: str | None
    index: int | None
    config: str
    description: str
    layout: str
    kept_energy: float


@dataclass(frozen=True)
class Report:
    """What ``compress_`` did: packed layers, every linear layer left dense with the reason, and sizes."""

    layers: tuple[CompressedLayer, ...]
    skipped: Mapping[str, str]
    size: SizeReport

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": dict(self.skipped),
            "size": self.size.to_dict(),
        }

    def __str__(self) -> str:
        rows = [[x.path, x.role or "-", x.description, x.layout, f"{x.kept_energy:.4f}"] for x in self.layers]
        parts = [
            f"compressed {len(self.layers)} layers",
            table(["layer", "role", "format", "held as", "energy kept"], rows),
            "\n".join(f"left dense: {path}: {reason}" for path, reason in self.skipped.items()),
            str(self.size),
        ]
        return "\n".join(part for part in parts if part)

    __repr__ = __str__


@dataclass(frozen=True)
class LayerExplanation:
    """What runs one layer at ``tokens`` rows of x, what was refused, and whether that rests on a measurement."""

    path: str
    role: str | None
    config: str
    layout: str
    kernel: str
    refused: tuple[str, ...]
    basis: str


@dataclass(frozen=True)
class Explanation:
    """``layers``: those that are packed. ``normalized``: those of a fused encoder that a normalization follows, packed
    or dense, with it; one kernel for both takes the place of the layer's own."""

    device: str
    tokens: int
    layers: tuple[LayerExplanation, ...]
    normalized: tuple[LayerExplanation, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"on {self.device}, at {self.tokens} tokens"]
        groups: dict[tuple[str, ...], list[str]] = {}
        for layer in (*self.layers, *self.normalized):
            key = (layer.config, layer.layout, layer.kernel, layer.basis, *layer.refused)
            groups.setdefault(key, []).append(layer.path)
        for (config, layout, kernel, basis, *refused), paths in groups.items():
            lines.append(f"{config} held as {layout}, run by {kernel}; {basis}")
            lines += [f"  refused: {reason}" for reason in refused]
            lines += [f"  {path}" for path in paths]
        return "\n".join(lines)

    __repr__ = __str__


def size_report(model: nn.Module) -> SizeReport:
    """Bytes of parameters and buffers of ``model``, each tensor counted once.

    ``encoder`` sums the linear layers that have a role (for a family without a table of roles: the packed ones),
    weights and biases; ``model`` sums everything.
    """
    places = role_of(model)
    seen: set[int] = set()
    encoder = total = Bytes(0, 0, 0)
    layers = []
    for path, module in model.named_modules():
        size = _own_bytes(module, seen)
        total += size
        role, index = places.get(path, (None, None))
        if isinstance(module, PackedLinear):
            layers.append(LayerSize(path, role, index, module.description, module.layout, size))
        elif role is not None:
            layers.append(LayerSize(path, role, index, "dense", "dense", size))
    for layer in layers:
        if layer.role is not None or not places:
            encoder += layer.bytes
    return SizeReport(encoder, total, tuple(layers))


def explain(model: nn.Module, *, tokens: int = 128) -> Explanation:
    """For each packed layer its layout, the kernel that runs it, what was refused and why, and what that rests on.
    Likewise, where the encoder is fused, for each linear with the normalization after it: one kernel or two.

    ``tokens`` is the number of rows of x (batch times length). ``ValueError`` where nothing in ``model`` is packed.
    """
    places = role_of(model)
    layers = []
    device = torch.device("cpu")
    for path, module in packed_layers(model):
        spec, device = module.spec, module.device
        problem = module.problem(tokens)
        kernel = "nothing on this device" if device.type == "meta" else _kernel(problem)
        refused = [f"{c.backend}: {reason}" for c, reason in select.reasons(problem) if reason]
        for name in layouts.names(spec.op):
            if reason := layouts.get(spec.op, name).supports(spec, module.dtype, device):
                refused.append(f"layout {name}: {reason}")
        if module.requested_layout != "auto":
            basis = f"layout asked for: {module.requested_layout}"
        else:
            choice = layout_choice.best(spec, module.dtype, device)
            basis = choice.reason
        layers.append(
            LayerExplanation(
                path,
                places.get(path, (None, None))[0],
                module.description,
                module.layout,
                kernel,
                tuple(refused),
                basis,
            )
        )
    return Explanation(describe(device).name, tokens, tuple(layers), _with_normalization(model, tokens))


@torch.no_grad()
def _with_normalization(model: nn.Module, tokens: int) -> tuple[LayerExplanation, ...]:
    found = []
    for layer in normalized(model):
        parameter, weight = layer.norm.weight, held_by(layer.linear)
        if weight is None:
            continue
        problem = linear_layer_norm.problem_of(weight.spec, weight.layout, parameter, quantize=layer.quantize)
        problem = problem._replace(tokens=tokens)
        solution = select.fused(problem)
        row = measurements.of(problem.spec, problem.layout, problem.dtype, problem.device, tokens)
        found.append(
            LayerExplanation(
                layer.path,
                None,
                f"{problem.spec.label} with LayerNorm",
                problem.layout,
                "two kernels" if solution is None else f"{solution.backend} ({solution.description})",
                tuple(f"{c.backend}: {reason}" for c, reason in select.reasons(problem) if reason),
                "not measured here" if row is None else f"{row.source} at {row.tokens} tokens",
            )
        )
    return tuple(found)


def packed_layers(model: nn.Module) -> list[tuple[str, PackedLinear]]:
    """Every packed layer with its path; ``ValueError`` where there is none."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, PackedLinear)]
    if not found:
        raise ValueError(f"{type(model).__name__}: no layer is packed; call compress_ first")
    return found


def role_of(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Path -> (role, encoder layer) where every role of the model's family is found, else empty."""
    try:
        return {layer.path: (layer.role, layer.index) for layer in find_layers(model)}
    except ValueError:
        return {}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text in aligned columns."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _kernel(problem: select.Problem) -> str:
    try:
        solution = select.choose(problem)
    except RuntimeError as error:
        return f"nothing ({error})"
    return f"{solution.backend} ({solution.description})"


def _own_bytes(module: nn.Module, seen: set[int]) -> Bytes:
    """Bytes of a module's own tensors, children left out."""
    if isinstance(module, PackedLinear):
        seen.update(id(t) for t in (*module.buffers(), *module.parameters()))
        return Bytes(module.dense_bytes(), module.disk_bytes(), module.memory_bytes())
    size = Bytes(0, 0, 0)
    for tensors, transient in (
        (module._parameters, set()),
        (module._buffers, module._non_persistent_buffers_set),
    ):
        for name, tensor in tensors.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            saved = 0 if name in transient else tensor.nbytes
            size += Bytes(tensor.nbytes, saved, tensor.nbytes)
    return size


def _percent(size: Bytes) -> str:
    return f"{100 * size.disk / size.dense:.1f} %" if size.dense else "-"
