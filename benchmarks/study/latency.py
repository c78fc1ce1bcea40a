"""How long a model in each of the study's formats takes beside the dense one, in turns on this machine."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sparsebert as sb
from sparsebert.bench.timing import measure_together
from sparsebert.cli import models
from sparsebert.configs import parse_config
from study.arms import Arm

# (sentences, tokens in each)
INPUTS = ((1, 32), (8, 64))


def targets(arms: Iterable[Arm]) -> list[str]:
    """Every format that an arm ends in, and int8 on those of groups; the dense ones are what all are held against."""
    found = [part.target(s) for arm in arms for part in arm.parts[-1:] if part.target for s in arm.sparsities]
    groups = [target for target in dict.fromkeys(found) if target[0].isdigit()]
    return [target for target in dict.fromkeys(found) if target != "dense"] + [f"int8+{t}" for t in groups] + ["int8"]


def measure(
    path: str, targets: Sequence[str], device: torch.device, *, budget_s: float = 3.0
) -> Iterator[dict[str, Any]]:
    """A row for each format and input: the packed model's time over that of the dense one, which runs in turns with it.
    ``budget_s``: seconds for a row.

    Weights are those of the pre-trained model, pruned in one shot: what a format takes does not depend on the values.
    Where one threshold for all layers gave them other densities, the time of a format that skips zeros may differ.
    """
    dense = models.load(models.find(path), device=device, dtype=torch.float32).model
    dense = dense.to(torch.float16) if device.type == "cuda" else dense
    for target in targets:
        packed = copy.deepcopy(dense)
        sb.compress_(packed, parse_config(target))
        for batch, length in INPUTS:
            length = min(length, dense.config.max_position_embeddings)
            inputs = make_inputs(dense, batch, length, device)
            calls = {name: partial(forward, model, inputs) for name, model in (("dense", dense), ("packed", packed))}
            found = measure_together(calls, device=device, budget_s=budget_s)
            yield {
                "kind": "latency",
                "format": target,
                "batch": batch,
                "length": length,
                "dtype": str(next(dense.parameters()).dtype).removeprefix("torch."),
                "ratio": found["packed"].median_us / found["dense"].median_us,
                "median_us": found["packed"].median_us,
                "dense_us": found["dense"].median_us,
                "mad_us": found["packed"].mad_us,
                "mode": found["packed"].mode,
            }


@torch.inference_mode()
def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    model(**inputs)


def make_inputs(model: Any, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
