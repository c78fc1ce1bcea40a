"""A model with its weights prepared, beside what it is compared with."""

from __future__ import annotations

import copy
import gc
import importlib.util
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparsebert as sb
from sparsebert.bench.jobs import Missing
from sparsebert.bench.models.encoders import Size, build, repeat_
from sparsebert.bench.models.inputs import FULL, Batch, draw_lengths, make_batch
from sparsebert.bench.models.rungs import TORCHAO, Weights
from sparsebert.nn import Int8Linear, PackedLinear

__all__ = ["LIMITS", "Models", "Prepared", "has_torchao", "held_layouts", "prepare"]

DENSE, QUANTIZED, ORIGINAL = "float32", "reference backend", "float32 before quantization"
# ||y - ref|| / ||ref|| over the last hidden states of real tokens, by what they are compared with; see Prepared.
LIMITS = {DENSE: 2e-2, QUANTIZED: 3e-2, ORIGINAL: 1e-1}
FLOAT32_LIMIT = 1e-3
_CALIBRATION = (8, 64)  # sequences, tokens each


@dataclass
class Prepared:
    """``model`` is what is timed and ``reference`` what its results are compared with, in one of three ways:

    - ``float32``: the same weights, unpacked, in float32. Half precision of BERT-base and -large stays below 2e-3
      (this and what follows: on a CPU, under 100 tokens), so that 2e-2 leaves room for other orders of sums, but for
      no mistake. In float32 that order is all that differs, and the limit is 1e-3.
    - ``reference backend``, for layers that quantize their inputs: the same packed weights, held neutral, by the
      reference kernels in the dtype of the run. Its sums are exact, so what differs comes from elsewhere, such as
      attention; but where an input moves by the last bit of half precision, some of the integers it is rounded to
      move by one, and through all layers that adds up to as much as rounding to integers does: nothing where all is
      done alike, but 0.9e-2 to 1.3e-2 between padded and unpadded rows of BERT-base. Hence 3e-2.
    - ``float32 before quantization``, for torchao, whose arithmetic has no reference here: holds the loss by 8 bits,
      2.6e-2 and 3.8e-2 for weights and inputs rounded by this package. Hence 1e-1, which tells working from broken.

    ``foreign_bytes`` on a GPU are those of the reference and of whatever was there before. ``anchor`` is a dense model
    of the same size and dtype, which is timed in turns with this one.
    """

    model: nn.Module
    reference: nn.Module
    compared: str
    dtype: torch.dtype
    sizes: dict[str, Any]
    foreign_bytes: int = 0
    anchor: nn.Module | None = None

    @property
    def limit(self) -> float:
        return FLOAT32_LIMIT if (self.compared, self.dtype) == (DENSE, torch.float32) else LIMITS[self.compared]

    def kernels(self, rows: int) -> dict[str, int]:
        """How many packed layers each backend runs where x has so many rows."""
        if not self.sizes["layouts"]:
            return {}
        return dict(Counter(layer.kernel.partition(" ")[0] for layer in sb.explain(self.model, tokens=rows).layers))

    def expected(self, batch: Batch) -> Tensor:
        """The last hidden states of the reference at the real tokens, float64 (tokens, hidden)."""
        dtype = next(self.reference.parameters()).dtype
        inputs = batch.padded(dtype)
        if self.compared == QUANTIZED:
            with sb.backend("reference"):
                y = self.reference(**inputs).last_hidden_state
        else:
            y = self.reference(**inputs).last_hidden_state
        return y[batch.real].double()


class Models:
    """Prepares models on demand and keeps the last one only, and one dense model as the anchor of all of its size."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key: tuple[Size, Weights] | None = None
        self._prepared: Prepared | None = None
        self._anchor: tuple[Size, torch.dtype, nn.Module] | None = None

    def get(self, size: Size, weights: Weights) -> Prepared:
        """The model of this size with these weights; the one before is let go of first."""
        if self._prepared is None or self._key != (size, weights):
            self._let_go()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            # Before it, so that its memory is none of the model's.
            anchor = self._anchor_of(size, weights.dtype(self.device))
            self._prepared = prepare(size, weights, self.device)
            self._prepared.anchor = anchor
            self._key = size, weights
        return self._prepared

    def _anchor_of(self, size: Size, dtype: torch.dtype) -> nn.Module:
        if self._anchor is None or self._anchor[:2] != (size, dtype):
            self._anchor = None
            self._anchor = size, dtype, repeat_(build(size, self.device, dtype), size.layers)
        return self._anchor[2]

    def _let_go(self) -> None:
        held = (
            [] if self._prepared is None else [weakref.ref(self._prepared.model), weakref.ref(self._prepared.reference)]
        )
        self._key = self._prepared = None
        # Rarely, what a frame of an error or a compiler still holds; looking for it takes longer than a small model.
        if any(model() is not None for model in held):
            gc.collect()


@torch.no_grad()
def prepare(size: Size, weights: Weights, device: torch.device) -> Prepared:
    """A model of this size with these weights on ``device``, compressed in one shot.

    ``RuntimeError`` where the device cannot hold the layout asked for, or torchao is needed and missing.
    """
    dtype = weights.dtype(device)
    before = _allocated(device)
    model = build(size, device, dtype)
    if weights.configs:
        sb.compress_(model, dict(weights.configs), layout="neutral")
    repeat_(model, size.layers)
    if weights.static:
        lengths = draw_lengths(FULL, *_CALIBRATION)
        batches = [make_batch(lengths, _CALIBRATION[1], size.vocabulary, device, seed=seed) for seed in (2, 3)]
        sb.calibrate(model, [{"input_ids": batch.ids} for batch in batches])
    # Before a layout is built, so that a mistake in building one shows.
    reference = copy.deepcopy(model)
    if weights.configs:
        _hold(model, weights.layout)
    if weights.name == TORCHAO:
        _quantize_by_torchao(model)
        compared, reference = ORIGINAL, reference.float()
    elif any(isinstance(module, Int8Linear) and module.layout != "dense" for module in model.modules()):
        compared = QUANTIZED
    else:
        # A layer held dense does not round its inputs.
        compared = DENSE
        reference = (sb.decompress_(reference) if weights.configs else reference).float()
    bytes_of_reference = sum(tensor.nbytes for tensor in _tensors(reference)) if device.type == "cuda" else 0
    return Prepared(model, reference, compared, dtype, _sizes(model, weights), before + bytes_of_reference)


def has_torchao() -> bool:
    return importlib.util.find_spec("torchao") is not None


def _quantize_by_torchao(model: nn.Module) -> None:
    if not has_torchao():
        raise Missing("torchao is not installed; pip install 'sparsebert[bench]' brings it")
    # A peer that is measured.
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # noqa: TID251

    # Its settings for the compiler would stay for what is compiled later: the ladder passes them on to this one alone.
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))


def _hold(model: nn.Module, layout: str) -> None:
    packed = [(path, module) for path, module in model.named_modules() if isinstance(module, PackedLinear)]
    for path, module in packed:
        if reason := module.layout_refusal(layout):
            raise RuntimeError(f"{path}: layout {layout}: {reason}")
        module.prepare_(layout)


def _sizes(model: nn.Module, weights: Weights) -> dict[str, Any]:
    """Bytes of the whole model and of its encoder's linear layers in memory, of the whole on disk, and how many layers
    are held in which layout."""
    if weights.name == TORCHAO:
        # Its tensors give the size of what they stand for.
        encoder = [t for m in model.get_submodule("encoder").modules() if isinstance(m, nn.Linear) for t in _tensors(m)]
        total = sum(tensor.nbytes for tensor in _tensors(model))
        sizes = {"model_bytes": total, "encoder_bytes": sum(tensor.nbytes for tensor in encoder), "disk_bytes": None}
    else:
        report = sb.size_report(model)
        sizes = {
            "model_bytes": report.model.memory,
            "encoder_bytes": report.encoder.memory,
            "disk_bytes": report.model.disk,
        }
    return {"layouts": held_layouts(model), **sizes}


def held_layouts(model: nn.Module) -> dict[str, int]:
    """How many packed layers are held in which layout."""
    return dict(Counter(module.layout for module in model.modules() if isinstance(module, PackedLinear)))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and what those are made of that wrap others."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield from _inner(tensor)


def _inner(tensor: Tensor) -> Iterator[Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inner(getattr(tensor, name))


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
