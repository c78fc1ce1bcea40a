"""``MaskedRun``: a run whose masks hold, so that a weight that is out takes no part in training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsebert.configs import BitmapConfig, Config, NMConfig, RowsConfig, SparseConfig
from sparsebert.methods.base import Kind, Run
from sparsebert.plan import CompressionPlan


class MaskedRun(Run):
    """W <- M * W after every optimizer step and G <- M * G before it, so that neither momentum nor weight decay brings
    a weight back; the model therefore always computes with M * W. A subclass renews ``masks`` in ``after_step`` and
    calls ``apply_masks``."""

    kinds = {"mask": Kind(torch.bool)}

    @property
    def masks(self) -> dict[str, Tensor]:
        """Path -> bool ``(out_features, in_features)``, True where a weight is kept."""
        return self.state["mask"]

    def mask(self, path: str) -> Tensor:
        """The mask of one layer."""
        return self.masks[path]

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        for path in self.configs:
            if (gradient := self.weight(path).grad) is not None:
                gradient.mul_(self.mask(path))

    def after_step(self) -> None:
        self.apply_masks()

    def apply_masks(self) -> None:
        for path in self.configs:
            drop_(self.weight(path), self.mask(path))

    def resumed(self) -> None:
        self.apply_masks()

    @torch.no_grad()
    def finalize(self) -> CompressionPlan:
        self.apply_masks()
        self.detach()
        plan = CompressionPlan(configs_of_masks(self.configs, self.masks))
        plan.verify(self.model)
        return plan


def drop_(weight: Tensor, mask: Tensor) -> None:
    """Zeros where ``mask`` is False, in place."""
    # masked_fill gives +0.0 where a product would keep the sign of a dropped weight, and drops NaN too.
    weight.masked_fill_(mask.logical_not(), 0.0)


def check_maskable(method: str, configs: Mapping[str, Config], *, columns: bool = False) -> None:
    """``ValueError`` unless every config is a mask over the weight: n:m, where ``columns`` say so also with columns, or
    bitmap."""
    for path, config in configs.items():
        if not isinstance(config, NMConfig | BitmapConfig):
            raise ValueError(f"{method}: {path}: {config} is not a mask; expected an NMConfig or a BitmapConfig")
        if isinstance(config, NMConfig) and config.columns is not None and not columns:
            # While a mask shrinks nobody knows which columns are kept, and so not which groups there are.
            raise ValueError(
                f"{method}: {path}: {config} drops columns, which cannot go little by little; expected an NMConfig "
                f"without columns"
            )


def kept_fraction(config: Config | SparseConfig) -> float:
    """The part of a weight, or of the sparse part of one, that ``config`` keeps."""
    if isinstance(config, NMConfig):
        return config.n / config.m
    return config.ratio if isinstance(config, RowsConfig) else config.density  # type: ignore[union-attr]


def configs_of_masks(configs: Mapping[str, Config], masks: Mapping[str, Tensor]) -> dict[str, Config]:
    """``configs`` with the density of each bitmap layer that of its mask: a threshold over all layers gives each its
    own."""
    found = dict(configs)
    for path, mask in masks.items():
        if isinstance(configs[path], BitmapConfig):
            # At least one weight may always be kept: a density of 0 is none.
            found[path] = BitmapConfig(max(1, int(mask.sum())) / mask.numel())
    return found
