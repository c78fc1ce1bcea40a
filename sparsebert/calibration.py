"""``calibrate``: measures the input scales of static int8 layers on real batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.formats import int8
from sparsebert.nn import Int8Linear, quantizing
from sparsebert.report import packed_layers, table
from sparsebert.roles import refuse_fused

METHODS = ("minmax", "percentile", "mse")
# Bins of the histogram of |x|: fine enough for 16 candidates a step of the int8 grid.
_BINS = 2048
# Candidates for the largest |x| that the search by squared error tries, as fractions of the largest seen.
_STEPS = 128


@dataclass(frozen=True)
class CalibratedLayer:
    """One static layer: how many numbers were seen, the largest of them, and where they are clipped now."""

    path: str
    count: int
    largest: float
    clipped_at: float
    input_scale: float


@dataclass(frozen=True)
class CalibrationReport:
    method: str
    batches: int
    layers: tuple[CalibratedLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [[x.path, f"{x.count:,}", f"{x.largest:.4g}", f"{x.clipped_at:.4g}"] for x in self.layers]
        return "\n".join(
            [
                f"calibrated {len(self.layers)} layers on {self.batches} batches, {self.method}",
                table(["layer", "numbers seen", "largest |x|", "clipped at"], rows),
            ]
        )

    __repr__ = __str__


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "minmax",
    *,
    percentile: float = 99.99,
) -> CalibrationReport:
    """Sets ``input_scale`` of every static int8 layer of ``model`` from what flows into it, input_scale = c / 127.

    The clipping point c is, by ``method``: ``minmax``, the largest |x| seen; ``percentile``, the |x| below which
    ``percentile`` percent of all numbers lie; ``mse``, the c that makes the squared error of rounding and clipping
    least. The last two look at a histogram of 2048 bins.

    ``batches``: what the model is called with, ``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list,
    ``model(batch)`` for a tensor; some hundred sequences like those to come are enough. While they run, static layers
    quantize as dynamic ones do. Padding tokens flow through the layers too and are counted.

    ``ValueError`` where the model has no static layer, there are no batches, a layer sees no number or NaN, or an
    argument is off; no scale is changed then.
    """
    if method not in METHODS:
        raise ValueError(f"calibrate: method is {method!r}, expected one of {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise ValueError(f"calibrate: percentile is {percentile}, expected above 0 and at most 100")
    refuse_fused(model, "calibrate")
    layers = {
        path: module
        for path, module in packed_layers(model)
        if isinstance(module, Int8Linear) and module.spec.activations == "static"
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__}: no layer has static int8 activations; compress with Int8Config('static') first"
        )
    observers = {path: _Observer() for path in layers}
    count = _observe(model, layers, observers, batches)
    found = []
    for path, observer in observers.items():
        if not observer.count:
            raise ValueError(f"{path}: no number flowed into this layer while calibrating")
        clip = {
            "minmax": observer.largest,
            "percentile": lambda: observer.percentile(percentile),  # noqa: B023 (called in this turn)
            "mse": observer.least_squares,
        }[method]()
        # As the dynamic rounding has it: zeros, and what is too small for a step, round to zero with any step.
        scale = clip / int8.LIMIT if clip >= int8.TINY else 1.0
        found.append(CalibratedLayer(path, observer.count, observer.largest(), clip, scale))
    for layer in found:
        layers[layer.path].set_input_scale_(layer.input_scale)
    return CalibrationReport(method, count, tuple(found))


def _observe(
    model: nn.Module, layers: Mapping[str, Int8Linear], observers: Mapping[str, _Observer], batches: Iterable[Any]
) -> int:
    """Runs the batches with an observer at each layer; the number of batches."""
    held, count = {path: layer.requested_layout for path, layer in layers.items()}, 0
    training = [(module, module.training) for module in model.modules()]
    device = next(iter(layers.values())).device
    handles = []
    model.eval()
    try:
        for path, layer in layers.items():
            # Neutral is what a dynamic pass over the weight starts from.
            layer.prepare_("neutral")
            layer.calibrating = True
            handles.append(layer.register_forward_pre_hook(_hook(path, observers[path])))
        # Dynamic layers beside them round as well, whatever holds them here: the scales serve other devices too.
        with quantizing(model):
            for batch in batches:
                _call(model, batch, device)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        for path, layer in layers.items():
            del layer.calibrating
            layer.prepare_(held[path])
        for module, mode in training:
            # Parts of a model that is trained may be frozen in eval mode.
            module.training = mode
    if not count:
        raise ValueError("calibrate: batches is empty, expected at least one")
    return count


def _hook(path: str, observer: _Observer) -> Any:
    def observe(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        try:
            observer.add(inputs[0])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    return observe


def _call(model: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        model(**{name: _on(value, device) for name, value in batch.items()})
    elif isinstance(batch, tuple | list):
        model(*(_on(value, device) for value in batch))
    else:
        model(_on(batch, device))


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


class _Observer:
    """A histogram of |x| over a range that doubles whenever a larger number comes: counts in ``_BINS`` equal bins."""

    def __init__(self) -> None:
        self.count = 0
        self._largest = 0.0
        self._range = 0.0
        self._bins = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """``ValueError`` where x holds NaN or infinities."""
        magnitudes = x.detach().float().abs().flatten()
        if not magnitudes.numel():
            return
        top = float(magnitudes.max())
        if not top < float("inf"):
            raise ValueError("x holds NaN or infinities while calibrating")
        if self._range == 0.0 and top > 0:
            self._range = top
            # Only zeros were seen before; they lie in the first bin of any range.
        while top > self._range > 0:
            # Twice the range: two bins become one.
            self._bins = torch.cat((self._bins.view(-1, 2).sum(1), torch.zeros(_BINS // 2, dtype=torch.float64)))
            self._range *= 2
        self._largest = max(self._largest, top)
        self.count += magnitudes.numel()
        if self._range == 0.0:
            self._bins[0] += magnitudes.numel()
        else:
            # It counts in fp32, which is exact up to 2**24.
            for part in magnitudes.split(1 << 24):
                self._bins += torch.histc(part, _BINS, 0.0, self._range).double().cpu()

    def largest(self) -> float:
        return self._largest

    def percentile(self, percent: float) -> float:
        """The upper edge of the bin that the percentile lies in, at most the largest number."""
        totals = self._bins.cumsum(0)
        place = int((totals < totals[-1] * (percent / 100)).sum())
        return min((place + 1) * self._range / _BINS, self._largest)

    def least_squares(self) -> float:
        """The clipping point with the least squared error of q = clamp(rint(x 127 / c)), each bin at its middle."""
        if self._largest == 0.0:
            return 0.0
        middles = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (self._range / _BINS)
        clips = self._largest * torch.arange(1, _STEPS + 1, dtype=torch.float64) / _STEPS
        scales = (clips / 127).unsqueeze(1)
        rounded = (middles / scales).round_().clamp_(max=127) * scales
        errors = ((rounded - middles).square() * self._bins).sum(1)
        return float(clips[errors.argmin()])
