"""BERT encoders of random weights, of which every layer has the weights of the first."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["SIZES", "Size", "build", "flops", "repeat_"]


@dataclass(frozen=True)
class Size:
    """A BERT encoder without a pooler; the feed-forward layers are four times as wide as ``hidden``."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int = 30522
    positions: int = 512


SIZES = {
    "base": Size("bert-base", 12, 768, 12),
    "large": Size("bert-large", 24, 1024, 16),
    "minilm": Size("minilm", 6, 384, 12),
    # For dry runs.
    "toy": Size("bert-toy", 2, 32, 2, vocabulary=100, positions=64),
}


def build(size: Size, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model of one layer, to be compressed and then repeated: weights normal with standard deviation 0.02 as BERT is
    initialized, biases likewise, so that a kernel which forgets one shows. The same on every call."""
    from transformers import BertConfig, BertModel

    options: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = BertConfig(
        num_hidden_layers=1,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.positions,
        **options,
    )
    # The generators of the caller stay as they are.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model: nn.Module = BertModel(config, add_pooling_layer=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, config.initializer_range)
    return model.eval().requires_grad_(False).to(dtype)


def repeat_(model: nn.Module, layers: int) -> nn.Module:
    """``model`` with its one layer repeated, each in memory of its own. In place; returns ``model``.

    What a layer costs does not depend on whether another has the same numbers, and packing one layer instead of 24 is
    what lets a dozen formats fit into minutes.
    """
    config: Any = model.config
    stack: Any = model.get_submodule("encoder.layer")
    config.num_hidden_layers = layers
    for _ in range(layers - 1):
        # One config for all, so that the attention chosen for the model is that of its layers.
        stack.append(copy.deepcopy(stack[0], {id(config): config}))
    return model


def flops(size: Size, lengths: Iterable[int]) -> int:
    """Multiplications and additions of the dense model on sequences of these lengths, padding left out: 24 n h^2 for
    the linear layers and 4 n^2 h for the two products of attention, in every layer."""
    return size.layers * sum(24 * n * size.hidden**2 + 4 * n**2 * size.hidden for n in lengths)
