"""The forward pass of a fused encoder: a padded batch packed, its tokens through all layers, and put back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
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
from sparsebert.nn.fused_encoder_layer import Rows, by_torch
from sparsebert.nn.packing import Packing
from sparsebert.nn.tokens import Tokens, encode


@dataclass(frozen=True)
class Blocks:
    """Where a family keeps its layers, and the two normalizations in each; names of what the config says of them."""

    layers: str = "encoder.layer"
    norms: tuple[str, str] = ("attention.output.LayerNorm", "output.LayerNorm")
    heads: str = "num_attention_heads"
    activation: str = "hidden_act"
    output: type[Any] = BaseModelOutputWithPoolingAndCrossAttentions


_BERT = Blocks()
BLOCKS: dict[str, Blocks] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": Blocks(output=BaseModelOutputWithPastAndCrossAttentions),
    "distilbert": Blocks(
        "transformer.layer", ("sa_layer_norm", "output_layer_norm"), "n_heads", "activation", BaseModelOutput
    ),
}
# Of a decoder, or of a training step: a fused encoder knows nothing of them.
_FOREIGN = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "head_mask", "cache_position")


class FusedEncoder:
    """The forward pass of a fused encoder; ``fused_class`` puts it before the model's own class."""

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


@cache
def fused_class(cls: Any) -> Any:
    """``cls`` with the forward of ``FusedEncoder``, by the same name: that is what a checkpoint's config says."""
    names = tuple(name for name in inspect.signature(cls.forward).parameters if name not in ("self", "kwargs"))
    own = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "unfused_class": cls,
        "argument_names": names,
    }
    return type(cls.__name__, (FusedEncoder, cls), own)
