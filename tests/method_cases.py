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
    """``teacher``: whether the method wants one. ``start``: what makes a model one to begin with."""

    method: Callable[[], sb.methods.Method]
    teacher: bool = False
    start: Callable[[nn.Module], None] = lambda model: None

    def prepare(self, model: nn.Module, steps: int, teacher: nn.Module) -> sb.methods.Run:
        self.start(model)
        return self.method().prepare(model, total_steps=steps, **({"teacher": teacher} if self.teacher else {}))


@torch.no_grad()
def halve(model: nn.Module) -> None:
    """Leaves the larger half of each encoder weight: what LPAF starts from."""
    sb.methods.Magnitude(sb.BitmapConfig(0.5)).prepare(model, total_steps=1).finalize()


METHODS = {
    "magnitude": Row(lambda: sb.methods.Magnitude(sb.NMConfig(2, 4))),
    "gradual": Row(lambda: sb.methods.GradualMagnitude(sb.BitmapConfig(0.3), granularity="global", start=0, every=1)),
    "snip": Row(lambda: sb.methods.Snip(sb.BitmapConfig(0.3), batches=1)),
    "platon": Row(lambda: sb.methods.Platon(sb.BitmapConfig(0.3), window=2, start=0, end=1)),
    "seven": Row(lambda: sb.methods.SEVEN(sb.BitmapConfig(0.3), start=0, length=3, every=1)),
    "seven-nm": Row(lambda: sb.methods.SEVEN(sb.NMConfig(2, 4), signed=True, start=0, length=2, every=1)),
    "seven-pre": Row(lambda: sb.methods.SEVEN(sb.NMConfig(2, 4), variant="pre", batches=1)),
    "admm": Row(lambda: sb.methods.ADMM(sb.NMConfig(2, 4), admm=0.5)),
    "admm-sr-ste": Row(lambda: sb.methods.ADMM(sb.BitmapConfig(0.3), admm=0.4, finish="sr-ste", every=1)),
    "admm-blocks": Row(lambda: sb.methods.ADMM(sb.BitmapConfig(0.5), projection=sb.methods.Block(2, 4, 4), admm=0.5)),
    "admm-int8": Row(lambda: sb.methods.ADMM(sb.Int8Config(weights=sb.NMConfig(2, 4)), admm=0.5)),
    "movement": Row(lambda: sb.methods.Movement(sb.BitmapConfig(0.3), start=1, end=0, every=1)),
    "knowledge": Row(lambda: sb.methods.KnowledgePruning(sb.BitmapConfig(0.1), updates=3), teacher=True),
    "knowledge-nm": Row(
        lambda: sb.methods.KnowledgePruning(sb.NMConfig(1, 8), updates=3, task_loss=True), teacher=True
    ),
    "svd": Row(lambda: sb.methods.SVD(sb.LowRankConfig(rank=4))),
    "losparse": Row(lambda: losparse(sb.RowsConfig(0.25))),
    "losparse-nm": Row(lambda: losparse(sb.NMConfig(1, 4))),
    "losparse-bitmap": Row(lambda: losparse(sb.BitmapConfig(0.2))),
    "lpaf": Row(lambda: sb.methods.LPAF(sb.LowRankConfig(rank=4)), start=halve),
    "lpaf-taught": Row(
        lambda: sb.methods.LPAF(sb.LowRankConfig(rank=4), train_sparse=True),
        teacher=True,
        start=halve,
    ),
}
