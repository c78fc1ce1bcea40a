"""``fuse_``: a Hugging Face encoder that runs without padding, in fused layers; ``unfuse_`` takes it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from sparsebert.hf.fused_encoder import BLOCKS, FusedEncoder, fused_class
from sparsebert.nn import Int8Linear, PackedLinear, projection
from sparsebert.nn.fused_encoder_layer import LINEARS, NORMS, PARTS, PROJECTION, FusedEncoderLayer
from sparsebert.roles import FAMILIES, model_type

# What the configs call the activations of ``ops.activations``.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class FuseReport:
    """``layers`` were fused; ``separate``: by the path of a layer, why its query, key and value stay three."""

    layers: int
    separate: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        merged = self.layers - len(self.separate)
        lines = [f"fused {self.layers} layers; query, key and value are one projection in {merged} of them"]
        reasons: dict[str, list[str]] = {}
        for path, reason in self.separate.items():
            reasons.setdefault(reason, []).append(path)
        lines += [f"three in {', '.join(paths)}: {reason}" for reason, paths in reasons.items()]
        return "\n".join(lines)

    __repr__ = __str__


@torch.no_grad()
def fuse_(model: nn.Module) -> FuseReport:
    """Rewrites the encoder of a Hugging Face model in place to run fused and without padding; returns a report.

    For BERT, RoBERTa, XLM-R, DistilBERT and ELECTRA and what has their config, under any head, dense or packed by
    ``compress_``. Every layer becomes a ``FusedEncoderLayer``; the tokens that ``attention_mask (batch, length)``
    leaves lie in one matrix ``(total, hidden)`` from the embeddings to the last layer. The model is called as before
    and gives what it gave, within the error of its dtype, but zeros at padded positions, which also is what a head
    that reads the first position then gets where padding is on the left. ``output_hidden_states`` and
    ``output_attentions`` work, the latter by slower attention. ``state_dict()`` and ``save_pretrained`` have the names
    of the unfused model.

    For inference: a call in training mode is an error, as is a key-value cache, cross-attention or a mask of more than
    two dimensions. Where a mask is on a GPU, a call waits for it once: leave it on the CPU, or out where nothing is
    padded. ``ValueError``, the model being as it was, where it has no such encoder, is fused already, or a layer is
    not of the kind that its family has.
    """
    encoders = [(path, module) for path, module in model.named_modules() if _is_encoder(module)]
    if not encoders:
        raise ValueError(
            f"fuse_: {type(model).__name__} with model_type {model_type(model)!r} has no encoder to fuse, expected one "
            f"of {', '.join(BLOCKS)}"
        )
    layers: dict[str, tuple[nn.Module, dict[str, nn.Module], dict[str, Any]]] = {}
    separate: dict[str, str] = {}
    for path, encoder in encoders:
        for place, layer in _layers_of(path, encoder):
            layers[place] = layer, *_parts_of(place, layer, encoder)
    for place, (_, parts, _) in layers.items():
        if reason := projection.refusal([parts[name] for name in PARTS]):
            separate[place] = reason
    count = len(layers)
    for place in list(layers):
        # Nothing else holds them then, so that at most one layer's projections are in memory twice.
        layer, parts, options = layers.pop(place)
        if place not in separate:
            merged = projection.merge([parts[name] for name in PARTS])
            for name in PARTS:
                _put(layer, options["paths"][name], None)
                del parts[name]
            parts[PROJECTION] = merged
        fused = FusedEncoderLayer(parts, stands_for=layer, **options).train(layer.training)
        _put(model, place, fused)
    for _, encoder in encoders:
        own: Any = type(encoder)
        encoder.__class__ = fused_class(own)
    return FuseReport(count, separate)


@torch.no_grad()
def unfuse_(model: nn.Module) -> nn.Module:
    """Puts back the layers that ``fuse_`` replaced, with the weights they have now. In place; returns ``model``.
    ``ValueError`` where nothing is fused."""
    encoders: list[Any] = [module for module in model.modules() if isinstance(module, FusedEncoder)]
    if not encoders:
        raise ValueError(f"unfuse_: {type(model).__name__} is not fused")
    for path in [path for path, module in model.named_modules() if isinstance(module, FusedEncoderLayer)]:
        fused: Any = model.get_submodule(path)
        layer = fused.stands_for[0]
        for place, part in fused.parts().items():
            _put(layer, place, part)
        if isinstance(fused.intermediate, PackedLinear):
            fused.intermediate.activation = "none"
        _put(model, path, layer.train(fused.training))
    for encoder in encoders:
        encoder.__class__ = encoder.unfused_class
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether any encoder in ``model`` is fused."""
    return any(isinstance(module, FusedEncoder) for module in model.modules())


@contextmanager
def unfused(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, ``model`` is not fused; afterwards as it was before."""
    if not is_fused(model):
        yield model
        return
    unfuse_(model)
    try:
        yield model
    finally:
        fuse_(model)


def _is_encoder(module: nn.Module) -> bool:
    """The model of a family itself, without what may stand around it."""
    blocks = BLOCKS.get(model_type(module) or "")
    if blocks is None or not hasattr(module, "embeddings"):
        return False
    try:
        module.get_submodule(blocks.layers)
    except AttributeError:
        return False
    return True


def _layers_of(path: str, encoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``(path, layer)`` of an encoder that can be fused; ``ValueError`` for one that cannot."""
    config: Any = encoder.config
    name = path or type(encoder).__name__
    if isinstance(encoder, FusedEncoder):
        raise ValueError(f"fuse_: {name} is fused already")
    forward = type(encoder).forward
    if not forward.__module__.startswith("transformers.models."):
        raise ValueError(f"fuse_: {name} has a forward of its own ({forward.__module__}.{forward.__qualname__})")
    blocks = BLOCKS[config.model_type]
    for key, expected in (
        ("is_decoder", False),
        ("add_cross_attention", False),
        ("position_embedding_type", "absolute"),
    ):
        if (value := getattr(config, key, expected)) != expected:
            raise ValueError(f"fuse_: {name} has {key}={value!r} in its config, expected {expected!r}")
    activation = getattr(config, blocks.activation)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"fuse_: {name} has {blocks.activation}={activation!r} in its config, expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    for index, layer in enumerate(encoder.get_submodule(blocks.layers).children()):
        yield ".".join(filter(None, (path, blocks.layers, str(index)))), layer


def _parts_of(path: str, layer: nn.Module, encoder: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """What a fused layer is made of, and its options; ``ValueError`` where the layer has something else."""
    config: Any = encoder.config
    blocks = BLOCKS[config.model_type]
    roles = FAMILIES[config.model_type].roles
    # In the order of the layer's own state dict.
    paths = {
        **{name: roles[name] for name in (*PARTS, LINEARS[0])},
        NORMS[0]: blocks.norms[0],
        **{name: roles[name] for name in LINEARS[1:]},
        NORMS[1]: blocks.norms[1],
    }
    parts = {name: layer.get_submodule(place) for name, place in paths.items()}
    for name, part in parts.items():
        kind = nn.LayerNorm if name in NORMS else nn.Linear
        if type(part) is not kind and not (kind is nn.Linear and isinstance(part, PackedLinear)):
            raise ValueError(
                f"fuse_: {path}.{paths[name]} is a {type(part).__name__}, expected a {kind.__name__}"
                + (" or a packed layer" if kind is nn.Linear else "")
            )
        if isinstance(part, Int8Linear) and not part.has_input_scale:
            raise ValueError(
                f"fuse_: {path}.{paths[name]} has static activations and no input_scale yet; call sparsebert.calibrate "
                f"first"
            )
    options = {
        "heads": getattr(config, blocks.heads),
        "activation": ACTIVATIONS[getattr(config, blocks.activation)],
        "paths": paths,
    }
    return parts, options


def _put(root: nn.Module, path: str, module: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module
