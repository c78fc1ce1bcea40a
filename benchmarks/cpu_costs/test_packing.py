"""Packing and unpacking: megabytes of dense weight a second for each format, and what packing 2:4 costs beside others.

The throughput is that of three of BERT-base's twelve layers (low rank: one, as it is an SVD); the ratios are those of
all twelve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import bert_base
import pytest
import torch
from torch import Tensor

from sparsebert.formats import bitmap, int8, low_rank, mma_sp, nm, rows

# Groups that the loop of Python is timed on; its time for all of them follows in proportion.
SAMPLE = 1000
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Format:
    """``prepare`` makes of a weight what ``pack`` takes; ``unpack`` also gets the weight, for its shape and dtype."""

    pack: Callable[[Any], Sequence[Tensor]]
    unpack: Callable[[Sequence[Tensor], Tensor], object]
    prepare: Callable[[Tensor], Any] = lambda weight: weight
    dtype: torch.dtype = torch.float32
    layers: int = 3


def nm_format(n: int, m: int, dtype: torch.dtype = torch.float32) -> Format:
    return Format(
        pack=lambda w: nm.pack(w, n, m),
        unpack=lambda packed, w: nm.unpack(*packed, n, m, w.shape[1]),
        prepare=lambda w: nm.project(w, n, m),
        dtype=dtype,
    )


def quantize_24(weight: Tensor) -> Sequence[Tensor]:
    values, scales = int8.quantize_weight(weight)
    return *nm.pack(values, 2, 4), scales


FORMATS = {
    "2:4": nm_format(2, 4),
    "2:4 fp16": nm_format(2, 4, torch.float16),
    "1:4": nm_format(1, 4),
    "2:8": nm_format(2, 8),
    "bitmap 25%": Format(
        pack=bitmap.pack,
        unpack=lambda packed, w: bitmap.unpack(*packed, w.shape[1]),
        prepare=lambda w: bitmap.project(w, w.numel() // 4),
    ),
    "rows 10%": Format(
        pack=lambda w: rows.pack(w, rows.row_count(0.1, len(w))),
        unpack=lambda packed, w: rows.unpack(*packed, len(w)),
        prepare=lambda w: rows.project(w, rows.row_count(0.1, len(w))),
    ),
    "low rank 25%": Format(
        pack=lambda w: low_rank.factorize(w, low_rank.rank_for_ratio(0.25, *w.shape)),
        unpack=lambda packed, w: low_rank.unpack(*packed),
        layers=1,
    ),
    "int8": Format(
        pack=int8.quantize_weight,
        unpack=lambda packed, w: int8.dequantize(*packed),
    ),
    "int8 2:4": Format(
        pack=quantize_24,
        unpack=lambda packed, w: int8.dequantize(nm.unpack(*packed[:2], 2, 4, w.shape[1]), packed[2]),
        prepare=lambda w: nm.project(w, 2, 4),
    ),
    "mma_sp fp16": Format(
        pack=lambda neutral: mma_sp.pack(*neutral),
        unpack=lambda packed, w: mma_sp.unpack(*packed, 2, 4, *w.shape),
        prepare=lambda w: (*nm.pack(nm.project(w, 2, 4), 2, 4), 2, 4, w.shape[1]),
        dtype=torch.float16,
    ),
}
NAMES = [pytest.param(n, marks=pytest.mark.benchmark(min_rounds=1) if "rank" in n else ()) for n in FORMATS]


@pytest.mark.benchmark(group="pack", max_time=0.5, min_rounds=3)
@pytest.mark.parametrize("name", NAMES)
def test_pack(name, benchmark):
    form = FORMATS[name]
    weights = bert_base.weights(form.layers, form.dtype)
    prepared = [form.prepare(weight) for weight in weights]
    benchmark(lambda: [form.pack(item) for item in prepared])
    report(benchmark, weights)


@pytest.mark.benchmark(group="unpack", max_time=0.5, min_rounds=3)
@pytest.mark.parametrize("name", NAMES)
def test_unpack(name, benchmark):
    form = FORMATS[name]
    weights = bert_base.weights(form.layers, form.dtype)
    packed = [(form.pack(form.prepare(weight)), weight) for weight in weights]
    benchmark(lambda: [form.unpack(*pair) for pair in packed])
    report(benchmark, weights)


def report(benchmark: Any, weights: list[Tensor]) -> None:
    size = bert_base.megabytes(weights)
    benchmark.extra_info["mb"] = round(size, 1)
    if benchmark.enabled:
        benchmark.extra_info["mb_per_s"] = round(size / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="2:4 of BERT-base", max_time=0.1, min_rounds=1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_beside_a_topk_and_a_loop(dtype, benchmark, in_turns, bounded):
    weights = bert_base.weights(bert_base.LAYERS, DTYPES[dtype])
    projected = [nm.project(weight, 2, 4) for weight in weights]
    sample = weights[0].view(-1, 4)[:SAMPLE]

    def pack():
        return [nm.pack(weight, 2, 4) for weight in projected]

    def loop():
        for group in sample:
            torch.zeros(4, dtype=torch.bool).scatter_(0, group.abs().topk(2).indices, True)

    calls = {
        "pack": pack,
        "project": lambda: [nm.project(weight, 2, 4) for weight in weights],
        "project + pack": lambda: [nm.pack(nm.project(weight, 2, 4), 2, 4) for weight in weights],
        "clone + topk": lambda: [(w.clone(), w.reshape(-1, 4).abs().topk(2)) for w in weights],
        "loop over the sample": loop,
    }
    us = in_turns(calls, budget_s=6.0, warmup=1, min_repeats=3)
    benchmark(pack)
    groups = sum(weight.numel() for weight in weights) // 4
    whole, topk = us["loop over the sample"] * groups / SAMPLE, us["clone + topk"]
    bert = f"2:4 of BERT-base, {dtype}:"
    bounded(
        us,
        {"name": f"{bert} pack over clone + topk", "value": us["pack"] / topk, "at_most": 3},
        {"name": f"{bert} project + pack over clone + topk", "value": us["project + pack"] / topk, "at_most": 3},
        {
            "name": f"{bert} a loop of topk + scatter ({SAMPLE} of {groups} groups, scaled) over pack",
            "value": whole / us["pack"],
            "at_least": 10,
        },
    )
