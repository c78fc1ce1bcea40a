"""``Packing``: the real tokens of a padded batch, one after the other, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a batch ``(batch, length)`` are.

    ``indices`` int64 ``(total)``: their places in the batch taken as one row, ascending; None where all are real.
    ``cu_seqlens`` int32 ``(batch + 1)``: where each sequence begins among them, and the end of the last.
    ``max_length``: tokens of the longest. The padding may be on the right, on the left or in between: a sequence is
    the tokens that the mask leaves.
    """

    batch: int
    length: int
    indices: Tensor | None
    cu_seqlens: Tensor
    max_length: int

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, length: int, device: torch.device) -> Packing:
        """``mask (batch, length)``, on any device: not zero at real tokens; None where all are real.

        Waits for the device once where the mask is on one: how many tokens there are decides the shapes of everything
        that follows. ``ValueError`` where the mask has another shape.
        """
        lengths = [length] * batch
        indices = None
        if mask is not None:
            if mask.shape != (batch, length):
                raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected {(batch, length)}")
            # On the host, where looking for the tokens waits for nobody.
            real = (mask != 0).cpu()
            lengths = real.sum(1).tolist()
            if min(lengths, default=length) < length:
                indices = real.flatten().nonzero().flatten().to(device, non_blocking=True)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device, non_blocking=True)
        return cls(batch, length, indices, cu_seqlens, max(lengths, default=0))

    def pack(self, x: Tensor) -> Tensor:
        """``(batch, length, ...) -> (total, ...)``."""
        rows = x.flatten(0, 1)
        return rows if self.indices is None else rows.index_select(0, self.indices)

    def pad(self, rows: Tensor) -> Tensor:
        """``(total, ...) -> (batch, length, ...)``, zeros where no token is."""
        if self.indices is not None:
            places = rows.new_zeros((self.batch * self.length, *rows.shape[1:]))
            rows = places.index_copy(0, self.indices, rows)
        return rows.unflatten(0, (self.batch, self.length))
