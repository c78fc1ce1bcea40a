"""One row for each method and variant: what is tried with every one of them, in the Trainer and under torchrun."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import sparsebert as sb


def losparse(sparse):
    return sb.methods.LoSparse(sb.LowRankSparseConfig(rank=4, sparse=sparse), window=1, start=0, end=1)


@dataclass
class Row:
    """``method``: made for the model. ``teacher``: whether it wants one. ``start``: what makes a model one to begin
    with."""

    method: Callable[[nn.Module], sb.methods.Method]
    teacher: bool = False
    start: Callable[[nn.Module], None] = lambda model: None

    def prepare(self, model: nn.Module, steps: int, teacher: nn.Module) -> sb.methods.Run:
        self.start(model)
        return self.method(model).prepare(model, total_steps=steps, **({"teacher": teacher} if self.teacher else {}))


def layerwise(model: nn.Module) -> sb.methods.Method:
    """ADMM whose first phase is solved from the inputs of a batch."""
    config = sb.NMConfig(2, 4)
    moments = sb.methods.input_moments(model, [{"input_ids": torch.arange(3, 35).view(4, 8)}], config)
    return sb.methods.ADMM(config, input_moments=moments)


@torch.no_grad()
def halve(model: nn.Module) -> None:
    """Leaves the larger half of each encoder weight: what LPAF starts from."""
    sb.methods.Magnitude(sb.BitmapConfig(0.5)).prepare(model, total_steps=1).finalize()


METHODS = {
    "magnitude": Row(lambda model: sb.methods.Magnitude(sb.NMConfig(2, 4))),
    "gradual": Row(
        lambda model: sb.methods.GradualMagnitude(sb.BitmapConfig(0.3), granularity="global", start=0, every=1)
    ),
    "snip": Row(lambda model: sb.methods.Snip(sb.BitmapConfig(0.3), batches=1)),
    "platon": Row(lambda model: sb.methods.Platon(sb.BitmapConfig(0.3), window=2, start=0, end=1)),
    "seven": Row(lambda model: sb.methods.SEVEN(sb.BitmapConfig(0.3), start=0, length=3, every=1)),
    "seven-nm": Row(lambda model: sb.methods.SEVEN(sb.NMConfig(2, 4), signed=True, start=0, length=2, every=1)),
    "seven-pre": Row(lambda model: sb.methods.SEVEN(sb.NMConfig(2, 4), variant="pre", batches=1)),
    "admm": Row(lambda model: sb.methods.ADMM(sb.NMConfig(2, 4), admm=0.5)),
    "admm-layers": Row(layerwise),
    "admm-sr-ste": Row(lambda model: sb.methods.ADMM(sb.BitmapConfig(0.3), admm=0.4, finish="sr-ste", every=1)),
    "admm-blocks": Row(
        lambda model: sb.methods.ADMM(sb.BitmapConfig(0.5), projection=sb.methods.Block(2, 4, 4), admm=0.5)
    ),
    "admm-int8": Row(lambda model: sb.methods.ADMM(sb.Int8Config(weights=sb.NMConfig(2, 4)), admm=0.5)),
    "movement": Row(lambda model: sb.methods.Movement(sb.BitmapConfig(0.3), start=1, end=0, every=1)),
    "knowledge": Row(lambda model: sb.methods.KnowledgePruning(sb.BitmapConfig(0.1), updates=3), teacher=True),
    "knowledge-nm": Row(
        lambda model: sb.methods.KnowledgePruning(sb.NMConfig(1, 8), updates=3, task_loss=True), teacher=True
    ),
    "svd": Row(lambda model: sb.methods.SVD(sb.LowRankConfig(rank=4))),
    "losparse": Row(lambda model: losparse(sb.RowsConfig(0.25))),
    "losparse-nm": Row(lambda model: losparse(sb.NMConfig(1, 4))),
    "losparse-bitmap": Row(lambda model: losparse(sb.BitmapConfig(0.2))),
    "lpaf": Row(lambda model: sb.methods.LPAF(sb.LowRankConfig(rank=4)), start=halve),
    "lpaf-taught": Row(
        lambda model: sb.methods.LPAF(sb.LowRankConfig(rank=4), train_sparse=True),
        teacher=True,
        start=halve,
    ),
}
