"""One-shot magnitude pruning, the baseline: prune by |w| at the start, train the rest with the mask held.

Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks (NeurIPS 2015), with the
choice made inside each group of m as in Zhou et al.: Learning N:M Fine-grained Structured Sparse Neural Networks From
Scratch (ICLR 2021) and a mask that never changes, as NVIDIA's ASP has it.
"""

from __future__ import annotations

import torch
from torch import nn

from sparsebert.formats import one_shot
from sparsebert.methods.base import Method, Run
from sparsebert.methods.masked import MaskedRun, check_maskable
from sparsebert.plan import Selection


class Magnitude(Method):
    """Keeps the n largest |w| of every m (``NMConfig``, with its columns chosen first) or the largest of the whole
    matrix (``BitmapConfig``), and holds that mask through training.

    ``prepare`` zeroes the other weights at once; afterwards M is fixed, and each step applies ``G <- M * G`` before and
    ``W <- M * W`` after the optimizer, so that neither momentum nor weight decay brings a weight back.
    """

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        self._refuse_teacher(teacher)
        return MagnitudeRun(model, self.config, total_steps)


class MagnitudeRun(MaskedRun):
    @torch.no_grad()
    def __init__(self, model: nn.Module, selection: Selection, total_steps: int) -> None:
        super().__init__(model, selection, total_steps)
        check_maskable(self.method, self.configs, columns=True)
        # All masks before the first edit, so that a bad weight leaves the model as it was.
        self.state["mask"] = {
            path: one_shot.magnitude_mask(self.finite_weight(path), config)  # type: ignore[arg-type]
            for path, config in self.configs.items()
        }
        self.apply_masks()
