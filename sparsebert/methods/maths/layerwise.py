"""How far the outputs of a layer move with its weight, and the weight that moves them least near a given one."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebert.formats.common import wide

# Of the diagonal, added to it: directions that the inputs hardly have should not take weights at will. The value is
# that of SparseGPT and GPTQ.
DAMPING = 0.01
# Inputs below this part of the root mean square of all count as having it: one that was always 0 still orders its
# weights among themselves.
FLOOR = 1e-3


class OutputError:
    """f(V) = tr((V - W) C (V - W)^T) / 2: half of E|(V - W) x|² where C = E[x x^T].

    ``weight`` W ``(out, in)``, ``moment`` C ``(in, in)``. ``scale (in)``: D = diag(C)^(1/2), the root mean square of
    each input. In coordinates V D the quadratic form D^-1 C D^-1 has ones on its diagonal, to which ``DAMPING`` is
    added. Its eigenvectors are found once: O(in³), then O(out in²) for each minimum.
    """

    def __init__(self, weight: Tensor, moment: Tensor) -> None:
        check_moment(weight, moment)
        moment = moment.detach().to(weight.device, wide(weight.dtype))
        rms = moment.diagonal().sqrt()
        self.scale = rms.clamp(min=FLOOR * float(rms.square().mean().sqrt()))
        form = moment / (self.scale * self.scale[:, None])
        form.diagonal().add_(DAMPING)
        self._eigenvalues, self._eigenvectors = torch.linalg.eigh(form)
        self._pull = (weight * self.scale) @ form

    def minimum(self, anchor: Tensor, rho: float) -> Tensor:
        """argmin over V of f(V) + rho / 2 |(V - ``anchor``) D|², that is
        (W C + rho A D²) (C + rho D²)^-1, for ``rho`` above 0; shape and dtype of ``anchor``."""
        target = torch.add(self._pull, anchor * self.scale, alpha=rho)
        solved = (target @ self._eigenvectors).div_(self._eigenvalues + rho) @ self._eigenvectors.t()
        return solved.div_(self.scale).to(anchor.dtype)


def check_moment(weight: Tensor, moment: Tensor, *, name: str = "weight") -> None:
    """``ValueError`` unless ``moment`` can be E[x x^T] of the inputs of ``weight``."""
    columns = weight.shape[1]
    if tuple(moment.shape) != (columns, columns):
        raise ValueError(f"{name}: its moment is {tuple(moment.shape)}, expected ({columns}, {columns})")
    power = moment.diagonal()
    if not torch.isfinite(moment).all() or bool((power < 0).any()) or not bool(power.any()):
        raise ValueError(f"{name}: its moment is not E[x x^T]: expected finite numbers, some above 0 on the diagonal")
