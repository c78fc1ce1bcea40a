"""How large the inputs of each layer are, column by column: what weighs a weight's error in the layer's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.formats.common import wide
from sparsebert.plan import Selection, select


@torch.no_grad()
def input_norms(model: nn.Module, batches: Iterable[Mapping[str, Any]], selection: Selection) -> dict[str, Tensor]:
    """Path -> ``(in)``, the root mean square of each input of every layer that ``selection`` chooses.

    |w_ij| times the norm of input j is Wanda's score (Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach
    for Large Language Models, ICLR 2024): how far the layer's output moves without the weight, the other inputs being
    independent of this one. ``batches`` are what the model is called with; means are over all tokens, padding too. The
    model computes in evaluation mode and is left in the mode it was in.

    ``ValueError`` without batches, for a layer that no batch reaches, and for inputs that are NaN or infinite.
    """
    chosen, _ = select(model, selection)
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(chosen, 0)

    def listen(path: str, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2)
        power = flat.to(wide(flat.dtype)).square().sum(0)
        sums[path] = sums[path] + power if path in sums else power
        counts[path] += len(flat)

    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: listen(path, args[0]))
        for path in chosen
    ]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for inputs in batches:
            model(**inputs)
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    found = {}
    for path, count in counts.items():
        if not count:
            raise ValueError(f"input_norms: {path}: no batch came through this layer")
        found[path] = (sums[path] / count).sqrt()
        if not torch.isfinite(found[path]).all():
            raise ValueError(f"input_norms: {path}: inputs hold NaN or infinities")
    return found
