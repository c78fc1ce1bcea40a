"""``fuse_``: a Hugging Face encoder that runs without padding, in fused layers; ``unfuse_`` takes it back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)

from sparsebert import ops
from sparsebert.nn import Int8Linear, PackedLinear, projection
from sparsebert.nn.fused_encoder_layer import LINEARS, NORMS, PARTS, PROJECTION, FusedEncoderLayer, Rows, by_torch
from sparsebert.nn.packing import Packing
from sparsebert.nn.tokens import Tokens, encode
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
class _Blocks:
    """Where a family keeps its layers, and the two normalizations in each; names of what the config says of them."""

    layers: str = "encoder.layer"
    norms: tuple[str, str] = ("attention.output.LayerNorm", "output.LayerNorm")
    heads: str = "num_attention_heads"
    activation: str = "hidden_act"
    output: type[Any] = BaseModelOutputWithPoolingAndCrossAttentions


_BERT = _Blocks()
BLOCKS: dict[str, _Blocks] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _Blocks(output=BaseModelOutputWithPastAndCrossAttentions),
    "distilbert": _Blocks(
        "transformer.layer", ("sa_layer_norm", "output_layer_norm"), "n_heads", "activation", BaseModelOutput
    ),
}
# Of a decoder, or of a training step: a fused encoder knows nothing of them.
_FOREIGN = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "head_mask", "cache_position")


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
        encoder.__class__ = _fused_class(own)
    return FuseReport(count, separate)


@torch.no_grad()
def unfuse_(model: nn.Module) -> nn.Module:
    """Puts back the layers that ``fuse_`` replaced, with the weights they have now. In place; returns ``model``.
    ``ValueError`` where nothing is fused."""
    encoders: list[Any] = [module for module in model.modules() if isinstance(module, _Fused)]
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
    return any(isinstance(module, _Fused) for module in model.modules())


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


class _Fused:
    """The forward pass of a fused encoder; ``_fused_class`` puts it before the model's own class."""

    # What ``Runner`` looks for.
    sparsebert_fused = True
    unfused_class: type[nn.Module]
    # Of the model's own forward, in their order.
    argument_names: tuple[str, ...]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.argument_names, args, strict=False)), **kwargs}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        name = type(self).__name__
        if (ids is None) == (embeds is None):
            raise ValueError(f"{name}: expected either input_ids or inputs_embeds")
        if self.training:
            raise RuntimeError(
                f"{name} is fused, which is for inference: call model.eval(), or sparsebert.unfuse_(model) to train"
            )
        if foreign := [key for key in _FOREIGN if given.get(key) is not None] + (
            ["use_cache"] if given.get("use_cache") else []
        ):
            raise ValueError(f"{name} is fused and takes no {foreign[0]}; sparsebert.unfuse_(model) takes that back")
        (batch, length), device = next((x.shape[:2], x.device) for x in (ids, embeds) if x is not None)
        packing = Packing.of(given.get("attention_mask"), batch, length, device)
        call = _Call(self, packing, given)
        positions = _positions(self, ids, given.get("position_ids"), batch, length, device)
        types = given.get("token_type_ids")
        tokens = Tokens(
            packing.pack(positions if ids is None else ids),
            packing.pack(positions),
            None if types is None else packing.pack(types.expand(batch, length)),
            packing.cu_seqlens,
            packing.max_length,
        )

        def run(tokens: Tokens) -> Tensor:
            return _run(self, tokens, None if embeds is None else packing.pack(embeds), call)

        # Where more is wanted than the last hidden states, nobody else can run the layers.
        plain = embeds is not None or call.wanted
        hidden = run(tokens) if plain else encode(self, run, tokens)
        return call.output(packing.pad(hidden))


class _Call:
    """What a call collects beside the last hidden states, and what it returns."""

    def __init__(self, encoder: Any, packing: Packing, given: Mapping[str, Any]) -> None:
        config = encoder.config
        self.encoder, self.packing = encoder, packing
        self.blocks = BLOCKS[config.model_type]

        def asked(name: str) -> Any:
            return getattr(config, name, None) if given.get(name) is None else given[name]

        self.as_dict = asked("return_dict")
        # Of hidden states one may also ask for one index or some.
        self.selection = asked("output_hidden_states")
        wanted = self.selection is not None and self.selection is not False
        self.hidden: list[Tensor] | None = [] if wanted else None
        self.attentions: list[Tensor] | None = [] if asked("output_attentions") else None

    @property
    def wanted(self) -> bool:
        return self.hidden is not None or self.attentions is not None

    def add(self, x: Tensor) -> None:
        if self.hidden is not None:
            self.hidden.append(self.packing.pad(x))

    def attend(self, heads: int) -> Any:
        """Attention that keeps its weights, None where any other does."""
        if self.attentions is None:
            return None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y, weights = _attend(self.packing, heads, q, k, v)
            self.attentions.append(weights)  # type: ignore[union-attr]
            return y

        return attend

    def output(self, last: Tensor) -> Any:
        hidden = self.hidden
        if hidden is not None and not isinstance(self.selection, bool):
            # As transformers has it: an index or some, from the end where negative.
            chosen = [self.selection] if isinstance(self.selection, int) else list(self.selection)
            places = {index % len(hidden) for index in chosen if -len(hidden) <= index < len(hidden)}
            hidden = [state if i in places else None for i, state in enumerate(hidden)]  # type: ignore[misc]
        parts: dict[str, Any] = {"last_hidden_state": last}
        if (pooler := getattr(self.encoder, "pooler", None)) is not None:
            parts["pooler_output"] = pooler(last)
        parts["hidden_states"] = None if hidden is None else tuple(hidden)
        parts["attentions"] = None if self.attentions is None else tuple(self.attentions)
        output = self.blocks.output(**parts)
        return output.to_tuple() if self.as_dict is False else output


def _run(encoder: Any, tokens: Tokens, embeds: Tensor | None, call: _Call) -> Tensor:
    """All layers on ``tokens``; ``embeds (total, size)`` in place of the words' embeddings."""
    x = _embed(encoder.embeddings, tokens, embeds)
    if (project := getattr(encoder, "embeddings_project", None)) is not None:
        x = project(x)
    layers: list[Any] = list(encoder.get_submodule(call.blocks.layers))
    rows = Rows(x)
    call.add(x)
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        attend = call.attend(layer.heads)
        if attend is None and by_torch(rows.x):
            attend = _differentiable(call.packing, layer.heads)
        rows = layer(
            rows,
            tokens.cu_seqlens,
            tokens.max_length,
            attend=attend,
            reader=None if after is None else after.reader,
        )
        call.add(rows.x)
    return rows.x


def _embed(embeddings: Any, tokens: Tokens, embeds: Tensor | None) -> Tensor:
    """LayerNorm(words + positions + token types), ``(total, size)``."""
    words, positions, norm = embeddings.word_embeddings, embeddings.position_embeddings, embeddings.LayerNorm
    types = getattr(embeddings, "token_type_embeddings", None)
    type_ids = tokens.token_type_ids
    if types is not None and type_ids is None:
        type_ids = torch.zeros_like(tokens.input_ids)
    table = None if types is None else types.weight
    if embeds is None and not by_torch(words.weight, positions.weight, norm.weight):
        return ops.embed_layer_norm(
            tokens.input_ids,
            tokens.position_ids,
            None if table is None else type_ids,
            words.weight,
            positions.weight,
            table,
            norm.weight,
            norm.bias,
            norm.eps,
        )
    x = words(tokens.input_ids) if embeds is None else embeds
    if types is not None:
        x = x + types(type_ids)
    return F.layer_norm(x + positions(tokens.position_ids), x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _positions(
    encoder: Any, ids: Tensor | None, given: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor:
    """Position ids ``(batch, length)``."""
    if given is not None:
        return given.expand(batch, length)
    embeddings = encoder.embeddings
    if (of_ids := getattr(embeddings, "create_position_ids_from_input_ids", None)) is not None and ids is not None:
        # RoBERTa's begin after the padding's own, and count what is no padding.
        positions: Tensor = of_ids(ids, embeddings.padding_idx)
        return positions
    first = embeddings.padding_idx + 1 if of_ids is not None else 0
    return torch.arange(first, first + length, device=device).expand(batch, length)


def _attend(packing: Packing, heads: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the padded batch by torch's own functions: ``(total, hidden)``, and its weights ``(batch, heads,
    length, length)``, zeros where no token is."""
    real = packing.pad(torch.ones_like(q[:, 0])) != 0
    q, k, v = (packing.pad(x).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~real[:, None, None, :], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).masked_fill(~real[:, None, :, None], 0.0)
    return packing.pack((weights @ v).transpose(1, 2).flatten(2)), weights


def _differentiable(packing: Packing, heads: int) -> Any:
    return lambda q, k, v: _attend(packing, heads, q, k, v)[0]


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
    if isinstance(encoder, _Fused):
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


@cache
def _fused_class(cls: Any) -> Any:
    """``cls`` with the forward of ``_Fused``, by the same name: that is what a checkpoint's config says."""
    names = tuple(name for name in inspect.signature(cls.forward).parameters if name not in ("self", "kwargs"))
    own = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "unfused_class": cls,
        "argument_names": names,
    }
    return type(cls.__name__, (_Fused, cls), own)
