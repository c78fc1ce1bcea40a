"""The second moments of each layer's inputs: all that the error of a layer's outputs depends on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.formats.common import wide
from sparsebert.plan import Selection, select


@torch.no_grad()
def input_moments(model: nn.Module, batches: Iterable[Mapping[str, Any]], selection: Selection) -> dict[str, Tensor]:
    """Path -> ``(in, in)``, C = E[x x^T] over the inputs x of every layer that ``selection`` chooses.

    With another weight V in place of W a layer's outputs are off by E|(V - W) x|² = tr((V - W) C (V - W)^T).
    ``batches`` are what the model is called with; the mean is over all tokens, padding too. The model computes in
    evaluation mode and is left in the mode it was in. fp32, or fp64 where the inputs are. Memory: in² numbers for each
    layer.

    ``ValueError`` without batches, for a layer that no batch reaches, and for inputs that are NaN or infinite.
    """
    chosen, _ = select(model, selection)
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(chosen, 0)

    def listen(path: str, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2)
        flat = flat.to(wide(flat.dtype))
        if path not in sums:
            sums[path] = flat.new_zeros(flat.shape[1], flat.shape[1])
        sums[path].addmm_(flat.t(), flat)
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
    for path, count in counts.items():
        if not count:
            raise ValueError(f"input_moments: {path}: no batch came through this layer")
        if not torch.isfinite(sums[path].div_(count)).all():
            raise ValueError(f"input_moments: {path}: inputs hold NaN or infinities")
    return sums
