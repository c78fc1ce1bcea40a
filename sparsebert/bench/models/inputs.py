"""Batches of token ids: rows that are full, and rows as long as those of a task."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["DISTRIBUTIONS", "FULL", "Batch", "Distribution", "draw_lengths", "make_batch"]

FULL = "full"


@dataclass(frozen=True)
class Distribution:
    """Lengths with this ``mean`` of ``longest`` tokens: log-normal, their logarithm spread by ``sigma``, and what is
    longer than the row is cut. The means are those the tasks are known by, the spreads are assumed."""

    mean: int
    longest: int
    sigma: float


DISTRIBUTIONS = {"glue": Distribution(40, 128, 0.5), "squad": Distribution(180, 384, 0.35)}


@lru_cache(maxsize=64)
def draw_lengths(kind: str, batch: int, length: int) -> tuple[int, ...]:
    """Tokens of each of ``batch`` rows of at most ``length``; the same on every call.

    ``kind`` is ``full`` or one of ``DISTRIBUTIONS``, whose mean is scaled to other row lengths. A batch takes the
    quantiles (i + 1/2) / batch of its distribution, shuffled, with the median that gives the batch the mean it should
    have: within half a token for every size, and exactly the mean for a batch of one. ``ValueError`` for other kinds.
    """
    if kind == FULL:
        return (length,) * batch
    if kind not in DISTRIBUTIONS:
        raise ValueError(f"lengths: kind is {kind!r}, expected one of {', '.join((FULL, *DISTRIBUTIONS))}")
    shape = DISTRIBUTIONS[kind]
    mean = max(1.0, shape.mean * length / shape.longest)
    normal = statistics.NormalDist(0, shape.sigma)
    spread = [math.exp(normal.inv_cdf((i + 0.5) / batch)) for i in range(batch)]

    def cut(median: float) -> list[float]:
        return [min(max(median * factor, 1.0), float(length)) for factor in spread]

    low, high = 0.0, 2.0 * length
    for _ in range(60):
        median = (low + high) / 2
        low, high = (low, median) if statistics.fmean(cut(median)) > mean else (median, high)
    found = [round(value) for value in cut(high)]
    random.Random(f"{kind} {batch} {length}").shuffle(found)
    return tuple(found)


@dataclass(frozen=True)
class Batch:
    """Token ids ``(batch, length)`` of which row i has ``lengths[i]`` real ones, the others being 0."""

    ids: Tensor
    lengths: tuple[int, ...]

    @property
    def real(self) -> Tensor:
        """``(batch, length)``, True at real tokens."""
        ends = torch.tensor(self.lengths, device=self.ids.device)
        return torch.arange(self.ids.shape[1], device=self.ids.device) < ends[:, None]

    def padded(self, dtype: torch.dtype) -> dict[str, Any]:
        """What a model takes for all rows at full length.

        The mask is a ready one, 4-D and added to the scores: transformers then looks for no padding, which would wait
        for the device, and attention makes no such mask of its own in every layer. Without padding there is none.
        """
        if min(self.lengths) == self.ids.shape[1]:
            return {"input_ids": self.ids}
        batch, length = self.ids.shape
        mask = torch.zeros(batch, 1, 1, length, dtype=dtype, device=self.ids.device)
        mask.masked_fill_(~self.real[:, None, None, :], -math.inf)
        return {"input_ids": self.ids, "attention_mask": mask.expand(batch, 1, length, length)}

    def masked(self) -> dict[str, Any]:
        """What a fused model takes: all rows, and on the CPU, where looking at it waits for nobody, which are real."""
        if min(self.lengths) == self.ids.shape[1]:
            return {"input_ids": self.ids}
        return {"input_ids": self.ids, "attention_mask": self.real.cpu()}

    def packed(self) -> dict[str, Any]:
        """What a model with the attention of ``unpadded`` takes for the real tokens alone, in one row."""
        real, device = self.real, self.ids.device
        ends = torch.tensor((0, *self.lengths), device=device).cumsum(0).int()
        places = torch.arange(self.ids.shape[1], device=device).expand_as(self.ids)
        return {
            "input_ids": self.ids[real][None],
            "position_ids": places[real][None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(self.lengths),
            "max_length_k": max(self.lengths),
        }


def make_batch(lengths: tuple[int, ...], length: int, vocabulary: int, device: torch.device, *, seed: int = 1) -> Batch:
    """Random token ids, the same on every call and on every device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (len(lengths), length), generator=generator)
    batch = Batch(ids, lengths)
    return Batch(ids.masked_fill_(~batch.real, 0).to(device), lengths)
