"""What every format needs: the checks that come before a tensor's content is looked at, and bits in bytes."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Groups of up to so many entries are ranked by comparing all pairs; of 16 there are too many pairs.
_MOST_PAIRED = 8


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_matrix(weight: Tensor, dtypes: tuple[torch.dtype, ...], name: str) -> None:
    """``ValueError`` or ``TypeError`` unless ``weight`` is ``(out_features, in_features)`` in one of ``dtypes``."""
    if weight.dim() != 2:
        raise ValueError(f"{name}: weight has {weight.dim()} dimensions, expected 2 (out_features, in_features)")
    if weight.dtype not in dtypes:
        expected = "a floating-point tensor of 16, 32 or 64 bits" + (" or int8" if torch.int8 in dtypes else "")
        raise TypeError(f"{name}: weight is {weight.dtype}, expected {expected}")


def check_tensor(
    tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], label: str, why: str = ""
) -> None:
    """``ValueError`` unless ``tensor`` has this shape and one of these dtypes; the content is not looked at."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{label} has shape {tuple(tensor.shape)}, expected {shape}{why}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{label} is {dtype_name(tensor.dtype)}, expected {', '.join(map(dtype_name, dtypes))}")


def check_one_device(name: str, **tensors: Tensor) -> None:
    """``ValueError`` unless all tensors are on the device of the first."""
    (first, anchor), *others = tensors.items()
    for label, tensor in others:
        if tensor.device != anchor.device:
            raise ValueError(f"{name}: {first} is on {anchor.device}, {label} on {tensor.device}, expected one device")


def refuse_non_finite(tensor: Tensor, label: str, first_row: int = 0) -> None:
    """``ValueError`` with the first NaN or infinity and its row; ``first_row`` is the number of the tensor's first."""
    finite = torch.isfinite(tensor)
    if not finite.all():
        where = finite.logical_not().nonzero()[0].tolist()
        value = float(tensor[tuple(where)])
        raise ValueError(f"{label} holds {value} in row {first_row + where[0]}, expected finite numbers")


def refuse_minus_128(tensor: Tensor, label: str, first_row: int = 0) -> None:
    """int8 is symmetric here, -127 to 127, so that a kernel may negate and a sum of products has one bound."""
    if len(bad := (tensor == -128).nonzero()):
        raise ValueError(f"{label} holds -128 in row {first_row + int(bad[0, 0])}, expected -127 to 127")


def check_count(count: int, limit: int, label: str) -> None:
    """``ValueError`` unless ``0 <= count <= limit``."""
    if not 0 <= count <= limit:
        raise ValueError(f"{label} is {count}, expected 0 to {limit}")


def check_indices(indices: Tensor, count: int, limit: int, label: str) -> None:
    """``ValueError`` unless ``indices`` is int32 ``(count,)``, strictly ascending, from 0 to ``limit`` - 1."""
    check_count(count, limit, f"{label}: count")
    check_tensor(indices, (count,), (torch.int32,), label)
    if indices.is_meta or not count:
        return
    ascending = indices[1:] > indices[:-1]
    if not ascending.all():
        place = int(ascending.logical_not().nonzero()[0, 0])
        before, after = indices[place : place + 2].tolist()
        raise ValueError(f"{label} has {after} after {before} at {place + 1}, expected strictly ascending")
    for value in (int(indices[0]), int(indices[-1])):
        if not 0 <= value < limit:
            raise ValueError(f"{label} has {value}, expected 0 to {limit - 1}")


def fill_up(used: Tensor, count: int) -> Tensor:
    """int32 ``(count,)``, ascending: the ``True`` of ``used`` and the lowest ``False`` until there are ``count``."""
    spare = count - int(used.sum())
    used = used.clone()
    used[used.logical_not().nonzero().flatten()[:spare]] = True
    return used.nonzero().flatten().to(torch.int32)


def refuse_spare_elsewhere(indices: Tensor, used: Tensor, label: str) -> None:
    """``ValueError`` unless ``indices``, of which ``used`` hold a non-zero, are what ``fill_up`` gives.

    ``indices`` strictly ascend, so up to the first gap index i has the value i: a spare index with another value has
    a free place below it.
    """
    places = torch.arange(len(indices), dtype=indices.dtype, device=indices.device)
    if len(bad := (used.logical_not() & (indices != places)).nonzero()):
        raise ValueError(f"{label} has the spare {int(indices[bad[0, 0]])}, which is not the lowest that is free")


def largest(norms: Tensor, count: int) -> Tensor:
    """int32 ``(count,)``, ascending: where ``norms`` is largest; ties go to the lower index."""
    order = torch.sort(norms, descending=True, stable=True).indices[:count]
    return torch.sort(order).values.to(torch.int32)


def largest_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """``True`` at the ``n`` largest of every ``m`` consecutive entries of the last dimension, which ``m`` divides.

    Ties go to the earlier entry; NaN counts as larger than anything.
    """
    if scores.shape[-1] % m:
        raise ValueError(f"largest_in_groups: {scores.shape[-1]} entries a row, expected a multiple of {m}")
    if not 0 <= n <= m:
        raise ValueError(f"largest_in_groups: n is {n}, expected 0 to {m}")
    groups = scores.unflatten(-1, (scores.shape[-1] // m, m))
    if m <= _MOST_PAIRED:
        return _first_by_pairs(groups, n).view(scores.shape)
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :n]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order, True).view(scores.shape)


def _first_by_pairs(groups: Tensor, n: int) -> Tensor:
    """``True`` at the ``n`` entries of each group ``(..., m)`` that come first in a stable descending sort: those that
    lose to fewer than n others. A fifth of the time of the sort at m = 4, a third at m = 8."""
    entries = groups.unbind(-1)
    m = len(entries)
    # Each entry loses to all later ones until a comparison takes that back.
    lost = [torch.full_like(entry, m - 1 - i, dtype=torch.uint8) for i, entry in enumerate(entries)]
    for first, entry in enumerate(entries):
        nan = entry.isnan()
        for second in range(first + 1, m):
            # Nothing is at least NaN, so NaN as the later entry wins by itself.
            wins = (entry >= entries[second]).logical_or_(nan).view(torch.uint8)
            lost[first] -= wins
            lost[second] += wins
    # In place, as a comparison that makes bools of bytes takes twice as long.
    return torch.stack([losses.lt_(n).view(torch.bool) for losses in lost], -1)


def squared_norms(weight: Tensor, dim: int) -> Tensor:
    """Sums of squares over ``dim``, in float32, or in float64 for a float64 weight."""
    return weight.detach().to(wide(weight.dtype)).square().sum(dim)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 stays, all others become float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def whole_below(number: float) -> int:
    """``floor(number)``, where a float product that misses a whole number by its rounding counts as that number.

    0.29 * 100 is 28.999999999999996.
    """
    return int(round(number, 6))


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which matrix products keep the dtype they are given."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """``uint8 (rows, k)`` of small numbers -> ``uint8 (rows, ceil(k*bits/8))``, little-endian within a byte."""
    per_byte = 8 // bits
    rows, k = numbers.shape
    if spare := -k % per_byte:
        numbers = torch.nn.functional.pad(numbers, (0, spare))
    parts = numbers.reshape(rows, -(-k // per_byte), per_byte)
    packed = parts[..., 0].clone()
    for i in range(1, per_byte):
        packed |= parts[..., i] << (bits * i)
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of ``pack_bits``: the first ``count`` numbers of each row, ``uint8 (rows, count)``."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    numbers = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return numbers.flatten(1)[:, :count]
