"""How a total of kept weights is shared out among the layers.

Every function here returns a mapping from path to ``BitmapConfig``, which ``sb.compress_`` and every method take as
their config. ``by_score`` and ``by_sensitivity`` keep ``round(density * N)`` of the N weights of all their layers
together, exactly; ``uniform`` rounds in each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.configs import BitmapConfig
from sparsebert.formats import bitmap
from sparsebert.methods.maths import thresholds
from sparsebert.plan import select

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)


def uniform(
    model: nn.Module, density: float, *, layers: Iterable[str] | None = None, ignore: Iterable[str] = ()
) -> dict[str, BitmapConfig]:
    """The same density in every layer: all encoder linears, or those that ``layers`` names by role, path or pattern.

    Errors as ``plan.select``.
    """
    config = BitmapConfig(density)
    chosen, _ = select(model, config if layers is None else dict.fromkeys(layers, config), ignore=ignore)
    return dict.fromkeys(chosen, config)


def by_score(model: nn.Module, density: float, scores: Mapping[str, Tensor]) -> dict[str, BitmapConfig]:
    """Each layer keeps as many weights as it has among the largest of all ``scores`` together, and at least one.

    ``scores``: path -> tensor of finite numbers, of the shape of that layer's weight; the layers that are there share
    the total. With |W| these are the densities of global magnitude pruning. ``ValueError`` naming the layer where a
    layer cannot be compressed or its scores do not fit, and where there are more layers than weights to keep.
    """
    config = BitmapConfig(density)
    chosen, skipped = select(model, dict.fromkeys(scores, config))
    raised: dict[str, Tensor] = {}
    for path, score in scores.items():
        if path not in chosen:
            raise ValueError(f"by_score: {path}: {skipped.get(path, 'is no path of a linear layer')}")
        shape = tuple(model.get_submodule(path).weight.shape)  # type: ignore[union-attr, arg-type]
        if tuple(score.shape) != shape:
            raise ValueError(f"by_score: {path}: scores have shape {tuple(score.shape)}, expected {shape}")
        if not torch.isfinite(score).all():
            raise ValueError(f"by_score: {path}: scores hold NaN or infinities")
        # A layer's best is in, whatever the others score.
        raised[path] = score.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        raised[path].view(-1)[raised[path].argmax()] = math.inf
    sizes = {path: score.numel() for path, score in raised.items()}
    masks = thresholds.largest_overall(raised, _total("by_score", sizes, density, dict.fromkeys(sizes, 1)))
    return _configs({path: int(mask.count_nonzero()) for path, mask in masks.items()}, sizes)


def by_sensitivity(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    density: float,
    *,
    loss: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
    densities: Sequence[float] = DENSITIES,
    layers: Iterable[str] | None = None,
    ignore: Iterable[str] = (),
) -> dict[str, BitmapConfig]:
    """Densities that minimize the sum of what pruning each layer alone does to the loss.

    Of every layer (``layers`` and ``ignore`` as in ``uniform``) the largest |w| are kept at each of ``densities``, the
    other layers dense, and the loss is summed over ``batches``; its increase at density 1 is 0. Between the measured
    densities the increase counts as a straight line and the curve as its lower convex hull: then giving the next weight
    to the layer where it lowers the sum most is the exact minimum. No layer goes below the smallest of ``densities``.

    ``batches``: mappings the model is called with, ``model(**inputs)``, in eval mode and without gradients;
    ``loss(outputs, inputs)`` is a scalar, by default ``outputs.loss``. This takes 1 + layers * densities passes over
    the batches. The model is left as it was, bit for bit, errors included. The sum of increases ignores that layers
    work together; how good a guide it is depends on the model.

    ``ValueError`` without batches or a loss, for a loss that is not finite, and for a total below what the smallest of
    ``densities`` takes.
    """
    config = BitmapConfig(density)
    grid = sorted({BitmapConfig(d).density for d in densities} - {1.0})
    if not grid:
        raise ValueError("by_sensitivity: no densities below 1 to measure")
    data = list(batches)
    if not data:
        raise ValueError("by_sensitivity: no batches to measure the loss on")
    paths = list(uniform(model, density, layers=layers, ignore=ignore))
    weights = {path: model.get_submodule(path).weight.detach() for path in paths}  # type: ignore[union-attr, operator]
    sizes = {path: weight.numel() for path, weight in weights.items()}
    counts = {path: [bitmap.keep_count(d, *weight.shape) for d in grid] for path, weight in weights.items()}
    total = _total("by_sensitivity", sizes, config.density, {path: found[0] for path, found in counts.items()})

    training = {module: module.training for module in model.modules()}
    curves: dict[str, list[tuple[int, float]]] = {}
    try:
        model.eval()
        dense = _sum_of_losses(model, data, loss, "the dense model")
        for path, weight in weights.items():
            original = weight.clone()
            points = {sizes[path]: 0.0}
            try:
                for count in counts[path]:
                    weight.copy_(original.masked_fill(bitmap.magnitude_mask(original, count).logical_not(), 0.0))
                    label = f"{path} with {count} weights kept"
                    points[count] = _sum_of_losses(model, data, loss, label) - dense
            finally:
                weight.copy_(original)
            curves[path] = sorted(points.items())
    finally:
        for module, mode in training.items():
            module.training = mode
    return _configs(share_out(curves, total), sizes)


def share_out(curves: Mapping[str, Sequence[tuple[int, float]]], total: int) -> dict[str, int]:
    """Counts, ``total`` of them together, that minimize the sum of ``curves``.

    A curve is points (count, cost) with ascending counts; between them it is a straight line, and what lies above the
    lower convex hull is taken for the hull. ``ValueError`` where ``total`` is below the sum of first counts or above
    that of the last. Among equal gains the earlier curve goes first.
    """
    counts = {name: points[0][0] for name, points in curves.items()}
    spare = total - sum(counts.values())
    if not 0 <= spare <= sum(points[-1][0] for points in curves.values()) - sum(counts.values()):
        raise ValueError(
            f"share_out: total is {total}, expected {sum(counts.values())} to "
            f"{sum(points[-1][0] for points in curves.values())}"
        )
    # The slopes of one hull ascend, so taking all pieces by their slope takes those of each curve in order.
    pieces = [
        ((after[1] - before[1]) / (after[0] - before[0]), name, after[0] - before[0])
        for name, points in curves.items()
        for before, after in _pairs(_lower_hull(points))
    ]
    for _, name, length in sorted(pieces, key=lambda piece: piece[0]):
        taken = min(length, spare)
        counts[name] += taken
        spare -= taken
    return counts


def _lower_hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    hull: list[tuple[int, float]] = []
    for x, y in points:
        # The last point goes while it lies on or above the line from the one before it to the new one.
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def _pairs(points: list[tuple[int, float]]) -> Iterable[tuple[tuple[int, float], tuple[int, float]]]:
    return zip(points, points[1:], strict=False)


@torch.no_grad()
def _sum_of_losses(
    model: nn.Module, data: list[Mapping[str, Any]], loss: Callable[[Any, Mapping[str, Any]], Tensor] | None, label: str
) -> float:
    total = 0.0
    for inputs in data:
        outputs = model(**inputs)
        value = getattr(outputs, "loss", None) if loss is None else loss(outputs, inputs)
        if value is None:
            raise ValueError(
                "by_sensitivity: the model's outputs have no loss; give it batches with labels, or a loss function"
            )
        total += float(value)
    if not math.isfinite(total):
        raise ValueError(f"by_sensitivity: the loss of {label} is {total}")
    return total


def _total(name: str, sizes: Mapping[str, int], density: float, least: Mapping[str, int]) -> int:
    """How many weights are kept, ``ValueError`` where that is less than the least of every layer together."""
    weights, needed = sum(sizes.values()), sum(least.values())
    total = round(density * weights)
    if total < needed:
        raise ValueError(
            f"{name}: density {density:g} keeps {total} of {weights} weights, but {len(sizes)} layers take at least "
            f"{needed}"
        )
    return total


def _configs(counts: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, BitmapConfig]:
    return {path: BitmapConfig(count / sizes[path]) for path, count in counts.items()}
