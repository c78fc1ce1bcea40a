"""Channel permutation: an order of hidden units that suits n:m, with the model's function unchanged.

n:m looks at consecutive inputs, and two orders inside an encoder layer are free: that of the feed-forward net's hidden
units (rows of ``intermediate``, columns of ``output``), and, in each head, that of the value's units (rows of
``value``, columns of ``attention_output``). They are permuted in the weights, so a forward pass costs nothing more. The
hidden state between layers has one order for the whole model, embeddings and heads included; it stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsebert.configs import Int8Config, NMConfig
from sparsebert.methods.maths.channel_permutation import find_permutation, kept_magnitude
from sparsebert.plan import Selection, select
from sparsebert.roles import LayerRef, feed_forward_pairs, find_layers


@dataclass(frozen=True)
class Permuted:
    """One layer whose columns were permuted: the fraction of its |w| that n:m keeps, before and after."""

    path: str
    before: float
    after: float


@torch.no_grad()
def permute_channels_(model: nn.Module, config: Selection, *, rounds: int = 100) -> list[Permuted]:
    """Permutes free channels of ``model`` in place so that n:m keeps more magnitude; the outputs stay the same but for
    rounding.

    ``config``: as ``compress_`` takes it; permuted are the columns of those ``output`` and ``attention_output`` layers
    that it gives an ``NMConfig`` without columns, or an ``Int8Config`` over one. Do it before a method's ``prepare``.
    ``rounds`` bounds the search (``maths.channel_permutation``). ``ValueError`` where the config leaves nothing to
    permute or a weight holds NaN, the model being as it was.
    """
    chosen, _ = select(model, config)
    patterns = {}
    for path, wanted in chosen.items():
        pattern = wanted.weights if isinstance(wanted, Int8Config) else wanted
        if isinstance(pattern, NMConfig) and pattern.columns is None:
            patterns[path] = pattern
    producers = _producers(model)
    work = [(path, pattern, *producers[path]) for path, pattern in patterns.items() if path in producers]
    if not work:
        raise ValueError(
            f"{type(model).__name__}: no layer whose inputs can be permuted for n:m; expected output or "
            f"attention_output layers with an NMConfig"
        )
    found = []
    for path, pattern, producer, rows, block in work:
        weight = _linear(model, path).weight
        if not torch.isfinite(weight).all():
            raise ValueError(f"{path}: weight holds NaN or infinities")
        if block % pattern.m == 0:
            found.append((path, pattern, producer, rows, _in_blocks(weight, pattern, block, rounds)))
    report = []
    for path, pattern, producer, rows, order in found:
        weight = _linear(model, path).weight
        total = float(weight.abs().double().sum()) or 1.0
        before = kept_magnitude(weight, pattern.n, pattern.m) / total
        weight.copy_(weight[:, order])
        linear = _linear(model, producer)
        for start in rows:
            part = slice(start, start + len(order))
            linear.weight[part] = linear.weight[part][order]
            if linear.bias is not None:
                linear.bias[part] = linear.bias[part][order]
        report.append(Permuted(path, before, kept_magnitude(weight, pattern.n, pattern.m) / total))
    return report


def _producers(model: nn.Module) -> dict[str, tuple[str, list[int], int]]:
    """Path of a consumer -> path of the layer whose rows are its columns, where these rows start, and the block of
    columns inside which the order is free."""
    found: dict[str, tuple[str, list[int], int]] = {}
    for inner, outer in feed_forward_pairs(model):
        width = _features(outer)[1]
        # A gated one has two halves of as many rows, multiplied entry by entry.
        found[outer.path] = (inner.path, list(range(0, _features(inner)[0], width)), width)
    heads = getattr(model.config, "num_attention_heads", None)
    places = {(layer.index, layer.role): layer for layer in find_layers(model)}
    for (index, role), layer in places.items():
        if role != "attention_output" or not isinstance(heads, int):
            continue
        width = _features(layer)[1]
        value, fused = places.get((index, "value")), places.get((index, "query_key_value"))
        if value is not None:
            found[layer.path] = (value.path, [0], width // heads)
        elif fused is not None:
            found[layer.path] = (fused.path, [2 * width], width // heads)
    return found


def _in_blocks(weight: Tensor, pattern: NMConfig, block: int, rounds: int) -> Tensor:
    parts = [
        start + find_permutation(weight[:, start : start + block], pattern.n, pattern.m, rounds=rounds)
        for start in range(0, weight.shape[1], block)
    ]
    return torch.cat(parts)


def _features(layer: LayerRef) -> tuple[int, int]:
    weight: Tensor = layer.module.weight  # type: ignore[assignment]
    return weight.shape[0], weight.shape[1]


def _linear(model: nn.Module, path: str) -> nn.Linear:
    return model.get_submodule(path)  # type: ignore[return-value]
