"""One-shot magnitude pruning, the baseline: prune by |w| at the start, train the rest with the mask held.

Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks (NeurIPS 2015), with the
choice made inside each group of m as in Zhou et al.: Learning N:M Fine-grained Structured Sparse Neural Networks From
Scratch (ICLR 2021) and a mask that never changes, as NVIDIA's ASP has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.configs import BitmapConfig, NMConfig
from sparsebert.formats import one_shot
from sparsebert.methods.base import Method, Run
from sparsebert.plan import CompressionPlan, Selection


class Magnitude(Method):
    """Keeps the n largest |w| of every m (``NMConfig``, with its columns chosen first) or the largest of the whole
    matrix (``BitmapConfig``), and holds that mask through training.

    ``prepare`` zeroes the other weights at once; afterwards M is fixed, and each step applies ``G <- M * G`` before and
    ``W <- M * W`` after the optimizer, so that neither momentum nor weight decay brings a weight back.
    """

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        if teacher is not None:
            raise ValueError("Magnitude: takes no teacher; add a distillation loss in the training loop")
        return MagnitudeRun(model, self.config, total_steps)


class MagnitudeRun(Run):
    @torch.no_grad()
    def __init__(self, model: nn.Module, selection: Selection, total_steps: int) -> None:
        super().__init__(model, selection, total_steps)
        # All masks before the first edit, so that a bad weight leaves the model as it was.
        self.masks = {}
        for path, config in self.configs.items():
            if not isinstance(config, NMConfig | BitmapConfig):
                raise ValueError(f"Magnitude: {path}: {config} is not a mask; expected an NMConfig or a BitmapConfig")
            self.masks[path] = one_shot.magnitude_mask(self._finite(path), config)
        self._apply_masks()

    def before_step(self) -> None:
        for path, mask in self.masks.items():
            if (gradient := self.weight(path).grad) is not None:
                gradient.mul_(self._on(mask, gradient))

    def after_step(self) -> None:
        self._apply_masks()

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"step": self.step, **{f"mask.{path}": mask.clone() for path, mask in self.masks.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        masks = {name.removeprefix("mask."): mask for name, mask in state.items() if name.startswith("mask.")}
        if masks.keys() != self.masks.keys():
            stray = sorted(masks.keys() ^ self.masks.keys())
            raise ValueError(f"Magnitude: the state is of other layers than the run, first {stray[0]}")
        for path, mask in masks.items():
            if mask.shape != self.masks[path].shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"Magnitude: {path}: mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool "
                    f"{tuple(self.masks[path].shape)}"
                )
        self.step = int(state["step"])
        self.masks = {path: mask.to(self.weight(path).device, copy=True) for path, mask in masks.items()}
        self._apply_masks()

    @torch.no_grad()
    def finalize(self) -> CompressionPlan:
        self._apply_masks()
        self.detach()
        plan = CompressionPlan(dict(self.configs))
        plan.verify(self.model)
        return plan

    def _apply_masks(self) -> None:
        for path, mask in self.masks.items():
            weight = self.weight(path)
            # masked_fill gives +0.0 where a product would keep the sign of a dropped weight, and drops NaN too.
            weight.masked_fill_(self._on(mask, weight).logical_not(), 0.0)

    def _on(self, mask: Tensor, like: Tensor) -> Tensor:
        return mask if mask.device == like.device else mask.to(like.device)

    def _finite(self, path: str) -> Tensor:
        weight = self.weight(path).detach()
        if not torch.isfinite(weight).all():
            raise ValueError(f"Magnitude: {path}: weight holds NaN or infinities")
        return weight
